"""Another tool's optimizer state: AdamW's moments by parameter name, or why they cannot be used.

Only states that continue exactly are accepted: AdamW from PyTorch (plain or fused, any release), transformers 4, apex,
and bitsandbytes, paged or not. Their moments mean the same; names and the type of the step counter differ. Moments that
bitsandbytes rounded to 8 bits stay 8-bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from onward.errors import DamagedState, ModelError, UsageError, first_line
from onward.text import how_many, quoted
from onward.training.checkpoints.loading import read_optimizer
from onward.training.device.environment import pick_device
from onward.training.foreign.arguments import Arguments
from onward.training.foreign.folders import TrainerFolder, fresh_hint
from onward.training.foreign.grouping import groupings
from onward.training.foreign.refusal import NotTaken
from onward.training.foreign.rounded import as_adamw_8bit, as_small, is_of_8_bits
from onward.training.optimizers import ADAMW, ADAMW_8BIT, OptimizerMethod
from onward.training.optimizers.adamw_8bit import WRAPPED
from onward.training.state import TrainState

Key = int | str
"""A parameter in a saved optimizer: its number, or its name if a tool saved that."""
Entry = dict[str, Any]
_TRAIN = "To go on exactly, say which weights were trained: --set 'train=[REGEX, ...]', found in their names."
_RENAMED = {"state1": "exp_avg", "state2": "exp_avg_sq"}
_SIGNS = ("amsgrad", "correct_bias", "bias_correction", "t_alpha")
"""Settings that only Adams have: PyTorch's, transformers', apex', bitsandbytes'. RAdam keeps the same tensors."""
_PLAIN = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit")
"""Optimizers of the Trainer whose files contain nothing else."""


@dataclass(frozen=True)
class Moments:
    """A saved optimizer.

    Args:
        groups: its parameter groups: settings, and under `params`, numbers or names.
        entries: what it keeps for each parameter that it has updated, in AdamW's form.
        dtype: the type in which it kept moments, which was that of its weights; here they are float32.
        method: the optimizer of Onward that continues with them.
    """

    groups: list[dict[str, Any]]
    entries: dict[Key, Entry]
    dtype: str = "float32"
    method: OptimizerMethod = ADAMW

    @property
    def rates(self) -> list[float]:
        """The peak learning rates of the groups that have parameters, each value once."""
        return list(dict.fromkeys(float(group.get("initial_lr", group["lr"])) for group in self._filled()))

    @property
    def decays(self) -> list[float]:
        """The weight decays other than 0, each once."""
        return [value for value in dict.fromkeys(float(group["weight_decay"]) for group in self._filled()) if value]

    def settings(self) -> dict[str, Any]:
        """Return the config values; of several learning rates, the first."""
        group = self._filled()[0]
        decay = max(self.decays, default=0.0)
        betas = [float(beta) for beta in group["betas"]]
        named: dict[str, Any] = {} if self.method is ADAMW else {"optimizer": self.method.name}
        rate, eps = self.rates[0], float(group["eps"])
        return {"learning_rate": rate, "weight_decay": decay, "betas": betas, "eps": eps, **named}

    def _filled(self) -> list[dict[str, Any]]:
        return [group for group in self.groups if group["params"]]


def read_moments(folder: TrainerFolder, arguments: Arguments, *, one_rate: bool) -> Moments:
    """Read the optimizer's state of a checkpoint.

    Args:
        one_rate: whether the user set the learning rate, so that groups may have had different ones.

    Raises:
        UsageError: it cannot be continued exactly; the message says what it is.
        DamagedState: the file is not an optimizer's.
        Unreadable: it cannot be read now.
    """
    path = folder.optimizer
    assert path is not None
    named = f" (the Trainer's optim was {arguments.text('optim')})" if arguments.text("optim") else ""
    try:
        saved = _read(path, arguments)
        groups = [dict(group) for group in cast(list[Mapping[str, Any]], saved["param_groups"])]
        held = cast(Mapping[Key, Mapping[str, Any]], saved["state"])
        moments = _moments(groups, held)
        quantizes = any(WRAPPED in entry or "state1" in entry for entry in held.values())
        _require_settings(moments, quantizes=quantizes, one_rate=one_rate)
    except NotTaken as reason:
        raise UsageError(f"{reason}{named}", where=path, hint=_ways(reason, folder)) from None
    except ModelError as error:
        what = f"the moments are those of an 8-bit optimizer{named}: {error.what}"
        raise UsageError(what, where=path, hint=f"{error.hint}, then adopt again. {fresh_hint(folder.path)}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        hint = fresh_hint(folder.path)
        raise DamagedState(f"this is not that of AdamW: {reason}{named}", where=path, hint=hint) from None
    return moments


def _ways(reason: NotTaken, folder: TrainerFolder) -> str:
    fresh = fresh_hint(folder.path)
    command = f"onward adopt {quoted(folder.path)} --run NEW_RUN {reason.setting}"
    return f"To go on with its moments and one learning rate: {command}\n{fresh}" if reason.setting else fresh


def _moments(groups: list[dict[str, Any]], held: Mapping[Key, Mapping[str, Any]]) -> Moments:
    if any(is_of_8_bits(entry) for entry in held.values()):
        ADAMW_8BIT.require(pick_device())
        return Moments(groups, {key: as_adamw_8bit(entry) for key, entry in held.items()}, method=ADAMW_8BIT)
    entries = {key: _as_adamw(entry, group_of(groups, key)) for key, entry in held.items()}
    return Moments(groups, entries, _type_of(held))


def _read(path: Path, arguments: Arguments) -> dict[str, Any]:
    try:
        saved = read_optimizer(path)
    except DamagedState as error:
        if arguments.text("optim") in ("", *_PLAIN):
            raise DamagedState(error.what, where=path, hint=fresh_hint(path.parent)) from None
        raise NotTaken(f"the optimizer's state contains more than tensors and plain values: {error.what}") from None
    return cast(dict[str, Any], saved.get("optimizer", saved))  # PyTorch's distributed checkpoints wrap it


def group_of(groups: list[dict[str, Any]], key: Key) -> dict[str, Any]:
    """Return the group that a parameter belongs to; the first if none names it."""
    return next((group for group in groups if key in group["params"]), groups[0])


def _as_adamw(entry: Mapping[str, Any], group: Mapping[str, Any]) -> Entry:
    """Return an entry with the names and types that PyTorch's AdamW gives them."""
    flat = {**entry, **cast(Mapping[str, Any], entry.get(WRAPPED, {}))}
    flat.pop(WRAPPED, None)
    values = {_RENAMED.get(name, name): value for name, value in flat.items()}
    if "step" not in values and "step" in group:  # apex counts once per group
        values["step"] = group["step"]
    if "max_exp_avg_sq" in values:
        raise NotTaken("the checkpoint was trained with AMSGrad, which keeps a third moment")
    wanted = {ADAMW.counter, *ADAMW.slots}
    if set(values) != wanted:
        found = ", ".join(sorted(map(str, values)))
        raise NotTaken(f"the optimizer's state is not that of AdamW: it keeps {found}")
    moments = {slot: cast(torch.Tensor, values[slot]) for slot in ADAMW.slots}
    if any(not torch.is_tensor(value) or not value.is_floating_point() for value in moments.values()):
        raise NotTaken("the moments are not floating-point numbers")
    counter = torch.as_tensor(values[ADAMW.counter], dtype=torch.float32).reshape(())
    return {ADAMW.counter: counter, **{slot: value.float() for slot, value in moments.items()}}


def _type_of(held: Mapping[Key, Mapping[str, Any]]) -> str:
    tensors = [value for entry in held.values() for value in entry.values() if torch.is_tensor(value) and value.ndim]
    return next(
        (str(value.dtype).removeprefix("torch.") for value in tensors if value.dtype != torch.float32), "float32"
    )


def _require_settings(moments: Moments, *, quantizes: bool, one_rate: bool) -> None:
    """Refuse settings under which AdamW would not do the same as that optimizer.

    Args:
        quantizes: whether the optimizer is one of bitsandbytes, whose settings show less.
        one_rate: whether several learning rates become one.
    """
    if not any(group["params"] for group in moments.groups):
        raise NotTaken("the optimizer's state is not that of AdamW: it belongs to no weights")
    for group in moments.groups:
        if len(group.get("betas", ())) != len(ADAMW.slots) or not (quantizes or any(sign in group for sign in _SIGNS)):
            raise NotTaken(f"the optimizer's state is not that of AdamW: its settings are {', '.join(sorted(group))}")
        decay = float(group["weight_decay"])
        if group.get("amsgrad"):
            raise NotTaken("the checkpoint was trained with AMSGrad, which keeps a third moment")
        if group.get("maximize") or group.get("correct_bias") is False or group.get("bias_correction") in (False, 0):
            raise NotTaken(
                "the checkpoint was trained with a variant of Adam that is not AdamW: maximize, or no bias correction"
            )
        if decay and _has_l2(group):
            raise NotTaken(f"the checkpoint was trained with Adam and L2 weight decay {decay:g}, which is not AdamW")
    if len(moments.rates) > 1 and not one_rate:
        rates = ", ".join(f"{rate:g}" for rate in moments.rates)
        what = f"its groups of weights have different learning rates ({rates}), as in LoRA+"
        raise NotTaken(what, f"--set learning_rate={moments.rates[0]:g}")
    if len(moments.decays) > 1 or len({(*map(float, group["betas"]), group["eps"]) for group in moments.groups}) > 1:
        raise NotTaken("its groups of weights have different weight decays, betas or eps")


def _has_l2(group: Mapping[str, Any]) -> bool:
    """Whether a group is from PyTorch's Adam, whose weight decay goes through the moments.

    Before PyTorch 2.7, its groups have the same keys as AdamW's in another order: AdamW wrote `foreach` before
    `maximize`.
    """
    said = group.get("decoupled_weight_decay")
    order = [key for key in group if key in ("maximize", "foreach")]
    return said is False or (said is None and order == ["maximize", "foreach"])


def load_into(state: TrainState, moments: Moments, folder: TrainerFolder, left_out: Collection[str] = ()) -> list[str]:
    """Put moments into a fresh state, by name.

    Args:
        left_out: the trained weights, and in full training the frozen ones, that no gradient reaches; their optimizer
            never touched them.

    Returns:
        Notes for the user: which weights change their decay, and which have no moments.

    Raises:
        UsageError: they belong to other weights.
        DamagedState: the moments of some weights are missing or have other shapes.
    """
    path = folder.optimizer
    assert path is not None
    moments = _of_method(state, moments, folder)
    named = _named(state, moments, folder, left_out)
    unmoved = [name for name in left_out if name not in named]
    notes = [*_decay_differs(state, moments, named), *_widened(moments), *_without(moments, unmoved)]
    counts = sorted({int(entry[state.method.counter]) for entry in named.values()})
    if len(counts) > 1:
        what = f"Adam's counters disagree (from {counts[0]} to {counts[-1]}): some weights skipped steps"
        raise DamagedState(what, where=path, hint=fresh_hint(folder.path))
    if counts and state.method is ADAMW:
        held = {name: state.parameters[name] for name in unmoved if name in state.parameters}
        named |= {name: _unmoved(parameter, counts[0]) for name, parameter in held.items()}
    for name, parameter in state.parameters.items():
        problem = state.method.problem(parameter, named.get(name)) if moments.entries else None
        if problem is not None:
            raise DamagedState(f"{name}: {problem}", where=path, hint=fresh_hint(folder.path))
    numbers = {name: number for number, name in enumerate(state.parameters)}
    entries = {
        numbers[name]: {slot: value.clone() for slot, value in entry.items()}
        for name, entry in named.items()
        if name in numbers
    }
    own = state.optimizer.state_dict()["param_groups"]
    for group in own:
        group["lr"] = float(moments.groups[0]["lr"])
    state.optimizer.load_state_dict({"state": entries, "param_groups": own})
    return notes


def _of_method(state: TrainState, moments: Moments, folder: TrainerFolder) -> Moments:
    """Return moments that the state's method can continue with."""
    if state.method is moments.method:
        return moments
    entries = as_small(state, moments.entries) if state.method is ADAMW_8BIT else None
    if entries is None:
        what = f"the moments are those of {moments.method.name}, and the run's optimizer is {state.method.name}"
        hint = f"Leave out --set optimizer={state.method.name}. {fresh_hint(folder.path)}"
        raise UsageError(what, where=folder.optimizer, hint=hint)
    return replace(moments, entries=entries, method=state.method)


def _widened(moments: Moments) -> Iterator[str]:
    if moments.dtype != "float32":
        yield f"weights and moments were {moments.dtype}: they continue in float32, from the same values"


def _named(state: TrainState, moments: Moments, folder: TrainerFolder, left_out: Collection[str]) -> dict[str, Entry]:
    """Return the entries by the parameter names of the run's model."""
    order = [key for group in moments.groups for key in group["params"]]
    if all(isinstance(key, str) for key in order):
        return {_own_name(str(key), state.parameters): entry for key, entry in moments.entries.items()}
    sizes = [len(group["params"]) for group in moments.groups if group["params"]]
    known = list(groupings(state.model, left_out))
    fitting = [names for names in known if [len(group) for group in names] == sizes]
    found = [names for names in fitting if _shapes_fit(state, moments, order, [n for group in names for n in group])]
    chosen = (found or fitting)[:1]
    if not chosen:
        expected = [len(group) for group in known[0]]
        what = f"the optimizer has parameter groups of {sizes}, the model of {expected}"
        hint = fresh_hint(folder.path)
        if sum(sizes) < sum(expected):
            what += ": some of the weights were frozen"
            hint = f"{hint}\n{_TRAIN}" if not isinstance(state.model, PeftModel) else hint
        elif any(weight.ndim > 2 for weight in state.parameters.values()):
            what += (
                ": it may have moments for each expert, as under transformers before 5, and not for all in one tensor"
            )
        raise DamagedState(what, where=folder.optimizer, hint=hint)
    names = [name for group in chosen[0] for name in group]
    return {name: moments.entries[key] for name, key in zip(names, order, strict=True) if key in moments.entries}


def _own_name(saved: str, known: Mapping[str, Any]) -> str:
    """Return a parameter's name without the parts that wrappers add."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module."):
        if saved not in known:
            saved = saved.replace(wrapper, "")
    return saved


def _shapes_fit(state: TrainState, moments: Moments, order: list[Key], names: list[str]) -> bool:
    shapes = {name: weight.shape for name, weight in state.model.named_parameters()}
    for key, name in zip(order, names, strict=True):
        entry = moments.entries.get(key)
        if entry is not None and entry[moments.method.slots[0]].shape != shapes[name]:
            return False
    return True


def _unmoved(parameter: torch.Tensor, count: int) -> Entry:
    """Return what AdamW keeps of a weight whose gradient was zero in as many steps."""
    return {ADAMW.counter: torch.tensor(float(count)), **{slot: torch.zeros_like(parameter) for slot in ADAMW.slots}}


def _without(moments: Moments, names: Collection[str]) -> Iterator[str]:
    if moments.entries and names:
        yield f"no row of text reaches {how_many(len(names), 'weight')}, such as {sorted(names)[0]}: without moments"


def _decay_differs(state: TrainState, moments: Moments, named: Mapping[str, Entry]) -> Iterator[str]:
    """Report how many weights get another weight decay than before: older Trainers decay some norms."""
    owner = {id(entry): key for key, entry in moments.entries.items()}
    decayed = {name for name, _ in ADAMW.groups(state.model)[0]}
    there = {name for name, entry in named.items() if float(group_of(moments.groups, owner[id(entry)])["weight_decay"])}
    others = sorted((there ^ decayed) & set(named)) if moments.decays else []
    if others:
        yield f"weight_decay falls on {len(others)} weights unlike the Trainer's, such as {others[0]}"
