"""Moments of other optimizers and tools: taken exactly, or refused by name with a way on that works."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import stock
import tiny
import torch
from commands import onward
from stock import STEPS, Saved
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from onward import Run
from onward.config import Config
from onward.errors import OnwardError, UsageError
from onward.store.ledger import Ledger
from onward.training.admission.findings import FACT, Findings
from onward.training.foreign.arguments import Arguments
from onward.training.foreign.folders import open_folder
from onward.training.foreign.grouping import GROUPINGS
from onward.training.foreign.moments import load_into, read_moments
from onward.training.optimizers import ADAMW
from onward.training.state import TrainState

Edit = Callable[[dict[str, Any]], Any]


def change(folder: Path, edit: Edit) -> None:
    """Edit the optimizer's state of a checkpoint."""
    values = torch.load(folder / "optimizer.pt", weights_only=True)
    edit(values)
    torch.save(values, folder / "optimizer.pt")


def each_entry(edit: Edit) -> Edit:
    """Edit what is kept for each parameter."""
    return lambda values: [edit(entry) for entry in values["state"].values()]


def each_group(edit: Edit) -> Edit:
    """Edit the settings of each group."""
    return lambda values: [edit(group) for group in values["param_groups"]]


def both(*edits: Edit) -> Edit:
    """Edit several times."""
    return lambda values: [edit(values) for edit in edits]


def only(*names: str, **others: Any) -> Edit:
    """Leave a group only some of its settings, and give it others."""

    def keep(group: dict[str, Any]) -> None:
        kept = {name: group[name] for name in ("params", "lr", "betas", "eps", "weight_decay", *names)}
        group.clear()
        group.update(kept, **others)

    return keep


def counted_whole(entry: dict[str, Any]) -> None:
    """Count steps in an integer, as PyTorch before 1.12, transformers 4 and bitsandbytes do."""
    entry["step"] = int(entry["step"])


def of_bitsandbytes(entry: dict[str, Any]) -> None:
    """Keep moments as bitsandbytes' 32-bit optimizers do."""
    entry.update(step=int(entry["step"]), state1=entry.pop("exp_avg"), state2=entry.pop("exp_avg_sq"))


def wrapped(entry: dict[str, Any]) -> None:
    """Keep them as bitsandbytes does since 0.49."""
    of_bitsandbytes(entry)
    entry["__bnb_optimizer_quant_state__"] = {name: entry.pop(name) for name in ("state1", "state2")}


def of_apex(values: dict[str, Any]) -> None:
    """Count steps once per group."""
    for group in values["param_groups"]:
        group.update(step=STEPS, bias_correction=1)
        del group["amsgrad"]
    for entry in values["state"].values():
        del entry["step"]


def with_empty_group(values: dict[str, Any]) -> None:
    """Add a group that has other settings and no weights, for which they mean nothing."""
    empty = {"params": [], "lr": 0.5, "initial_lr": 0.5, "weight_decay": 0.5}
    values["param_groups"].append({**values["param_groups"][0], **empty})


TAKEN: dict[str, Edit] = {
    "as it is": lambda values: None,
    "whole steps": each_entry(counted_whole),
    "steps in a tensor of one": each_entry(lambda entry: entry.update(step=entry["step"].reshape(1))),
    "an older PyTorch": each_group(only("amsgrad", foreach=None, maximize=False, capturable=False)),
    "transformers 4": both(each_entry(counted_whole), each_group(only(correct_bias=True))),
    "bitsandbytes, 32 bit": both(each_entry(of_bitsandbytes), each_group(only())),
    "bitsandbytes, 32 bit, wrapped": both(each_entry(wrapped), each_group(only(alpha=0.0, t_alpha=None, t_beta3=None))),
    "apex": of_apex,
    "a group without weights": with_empty_group,
    "Adam without weight decay": each_group(lambda group: group.update(decoupled_weight_decay=False, weight_decay=0.0)),
}  # fmt: skip


def start(saved: Saved) -> TrainState:
    """Return a fresh state of the stock model."""
    return TrainState.start(saved.model, Config())


def load(state: TrainState, folder: Path, **arguments: Any) -> list[str]:
    """Load a checkpoint's moments into a state."""
    opened = open_folder(folder, fresh=False)
    return load_into(state, read_moments(opened, Arguments(arguments), one_rate=False), opened)


@pytest.mark.parametrize("case", TAKEN)
def test_moments_of_every_kind_of_adamw_are_taken(case: str, saved: Saved, checkpoint: Path) -> None:
    """Each keeps other names, types or settings; moments and steps are the same, by parameter name."""
    change(checkpoint, TAKEN[case])
    state = start(saved)
    assert [] == load(state, checkpoint)
    stock.assert_equal(saved.moments, stock.moments(state.model, state.optimizer))
    assert STEPS == state.view().adam_step()


def named_state(saved: Saved, prefix: str = "") -> dict[str, Any]:
    """Return the optimizer's state by the names of parameters, as FSDP gathers it."""
    values = torch.load(saved.folder / "optimizer.pt", weights_only=True)
    names = [f"{prefix}{name}" for group in GROUPINGS[0](saved.model) for name in group]
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in values["param_groups"]]
    return {"state": {names[index]: entry for index, entry in values["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("prefix", ["", "_fsdp_wrapped_module."])
def test_moments_that_are_saved_by_name_are_taken(prefix: str, saved: Saved, checkpoint: Path) -> None:
    """FSDP's full state dict, `optimizer.bin`, knows parameters by their names."""
    (checkpoint / "optimizer.pt").unlink()
    torch.save(named_state(saved, prefix), checkpoint / "optimizer.bin")
    state = start(saved)
    load(state, checkpoint)
    stock.assert_equal(saved.moments, stock.moments(state.model, state.optimizer))


def test_sharded_moments_are_taken_after_the_command_that_is_named(saved: Saved, checkpoint: Path) -> None:
    """FSDP's shards are refused with a command of PyTorch's; what it makes is adopted."""
    (checkpoint / "optimizer.pt").unlink()
    sharded.save({"optimizer": named_state(saved)}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
    with pytest.raises(UsageError, match="FSDP wrote the optimizer's state in shards") as caught:
        open_folder(checkpoint, fresh=False)
    command = re.search(r"format_utils dcp_to_torch (.*); then", str(caught.value.hint))
    assert command is not None
    source, target = shlex.split(command[1])
    dcp_to_torch_save(source, target)
    state = start(saved)
    load(state, checkpoint)
    stock.assert_equal(saved.moments, stock.moments(state.model, state.optimizer))


@pytest.mark.parametrize("number", range(len(GROUPINGS)))
def test_groups_of_every_division_are_told_apart(number: int, model: Path, tmp_path: Path) -> None:
    """Weights divided as other releases and tools do are loaded by name; where the decay changes, it is said."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    parameters = dict(whole.named_parameters())
    groups = [group for group in GROUPINGS[number](whole) if group]
    decays = [0.1, *[0.0] * (len(groups) - 1)]
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[name] for name in group], "weight_decay": decay}
         for group, decay in zip(groups, decays, strict=True)]
    )  # fmt: skip
    sum((weight * torch.rand_like(weight)).sum() for weight in parameters.values()).backward()
    optimizer.step()
    folder = tmp_path / "checkpoint-1"
    whole.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    state = TrainState.start(whole, Config(method="full"))
    lines = load(state, folder)
    stock.assert_equal(stock.moments(whole, optimizer), stock.moments(whole, state.optimizer))
    same = {*groups[0]} == {*GROUPINGS[0](whole)[0]}
    assert same == (lines == [])


def test_moments_of_experts_apart_are_refused_as_such(tmp_path: Path) -> None:
    """Transformers before 5 has a weight for each expert, of which releases since then make one tensor."""
    whole = small.small_model("olmoe")
    apart = [part for weight in whole.parameters() for part in (weight.unbind() if weight.ndim > 2 else (weight,))]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(part.detach().clone()) for part in apart])
    whole.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    with pytest.raises(OnwardError, match="it may have moments for each expert") as caught:
        load(TrainState.start(whole, Config(method="full")), tmp_path)
    assert f"onward adopt {tmp_path} --run NEW_RUN --fresh-moments" in str(caught.value.hint)


def lora_plus(values: dict[str, Any]) -> None:
    """Give the weights of B another learning rate."""
    group = values["param_groups"][0]
    first, second = group["params"][::2], group["params"][1::2]
    values["param_groups"] = [{**group, "params": first}, {**group, "params": second, "initial_lr": 8e-4}]


def of_eight_bits(entry: dict[str, Any]) -> None:
    """Keep moments rounded, as 8-bit optimizers do for large weights."""
    of_bitsandbytes(entry)
    entry.update(state1=entry["state1"].byte(), state2=entry["state2"].byte(), qmap1=torch.ones(256), absmax1=1.0)


def frozen_part(values: dict[str, Any]) -> None:
    """Leave out half of the weights."""
    group = values["param_groups"][0]
    kept = group["params"][: len(group["params"]) // 2]
    values["state"] = {index: values["state"][index] for index in kept}
    group["params"] = kept


REFUSED: dict[str, tuple[Edit, str]] = {
    "8 bit": (each_entry(of_eight_bits), "8-bit"),
    "AMSGrad": (each_group(lambda group: group.update(amsgrad=True)), "AMSGrad"),
    "Adam with L2": (each_group(lambda group: group.update(decoupled_weight_decay=False)), "L2 weight decay 0.1"),
    "Adam with L2 of an older PyTorch": (
        each_group(only("amsgrad", maximize=False, foreach=None, capturable=False)), "L2 weight decay 0.1"
    ),
    "RAdam": (each_group(lambda group: group.pop("amsgrad")), "not that of AdamW"),
    "Lion": (
        each_entry(lambda entry: [entry.pop("exp_avg_sq"), entry.pop("step")]), "not that of AdamW: it keeps exp_avg"
    ),
    "AdEMAMix": (
        both(each_entry(of_bitsandbytes), each_group(lambda group: group.update(betas=(0.9, 0.99, 0.999)))),
        "not that of AdamW",
    ),
    "maximize": (each_group(lambda group: group.update(maximize=True)), "maximize"),
    "no bias correction": (each_group(lambda group: group.update(correct_bias=False)), "no bias correction"),
    "LoRA+": (lora_plus, "different learning rates"),
    "frozen": (frozen_part, "some of the weights were frozen"),
    "weights that sat out": (lambda values: values["state"][0]["step"].sub_(1), "skipped steps"),
    "weights without moments": (lambda values: values["state"].pop(0), "has no AdamW moments"),
    "no weights": (each_group(lambda group: group.update(params=[])), "belongs to no weights"),
    "settings that AdamW has": (each_group(lambda group: group.pop("eps")), "not that of AdamW: KeyError: 'eps'"),
    "several optimizers": (lambda values: values.update(first=values.pop("param_groups")), "not that of AdamW"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_adamw_cannot_go_on_with_is_refused_by_name(case: str, saved: Saved, checkpoint: Path) -> None:
    """The refusal says what it is, what the Trainer called it, and names the command that goes on from the weights."""
    edit, reason = REFUSED[case]
    change(checkpoint, edit)
    with pytest.raises(OnwardError) as caught:
        load(start(saved), checkpoint, optim="some_adam")
    assert reason in caught.value.what
    assert f"onward adopt {checkpoint} --run NEW_RUN --fresh-moments" in str(caught.value.hint)


def test_moments_of_half_precision_go_on_from_the_same_values(saved: Saved, checkpoint: Path) -> None:
    """A Trainer whose weights were bfloat16 had moments of that type; float32 holds all of them, and it is said."""
    halves = {slot: lambda entry, slot=slot: entry.update({slot: entry[slot].bfloat16()}) for slot in ADAMW.slots}
    change(checkpoint, both(*(each_entry(edit) for edit in halves.values())))
    state = start(saved)
    lines = load(state, checkpoint)
    assert ["weights and moments were bfloat16: they continue in float32, from the same values"] == lines
    expected = {name: value.bfloat16().float() for name, value in saved.moments.items()}
    stock.assert_equal(expected, stock.moments(state.model, state.optimizer))


def test_several_learning_rates_go_on_as_one_where_it_is_set(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    """LoRA+ is adopted with its moments under one learning rate, by the command that the refusal names."""
    change(checkpoint, lora_plus)
    with pytest.raises(UsageError, match="different learning rates") as caught:
        Run.adopt(checkpoint, tmp_path / "run", str(model))
    command = re.search(r"one learning rate: onward (.*)\n", str(caught.value.hint))
    assert command is not None
    words = shlex.split(command[1].replace("NEW_RUN", str(tmp_path / "run")))
    assert 0 == onward(*words, "--model", model).status
    run = Run(tmp_path / "run")
    assert (5e-5, "linear", STEPS) == (run.config.learning_rate, run.config.schedule, run.status()["global_step"])


def test_a_frozen_part_stays_frozen_where_train_names_the_rest(tmp_path: Path) -> None:
    """The refusal names the key with which weights and moments of a partly frozen model go on bit for bit."""
    model = tiny.save_tiny_model(tmp_path / "model", layers=2)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.get_submodule("model.layers.0").requires_grad_(False)
    trainer = stock.trainer(
        whole, tmp_path / "stock", processing_class=tiny.byte_tokenizer(), max_steps=2, weight_decay=0.1,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    with pytest.raises(OnwardError, match="some of the weights were frozen") as caught:
        Run.adopt(tmp_path / "stock" / "checkpoint-2", tmp_path / "refused")
    assert "--set 'train=[REGEX, ...]'" in str(caught.value.hint)
    settings = {"train": ["layers.1.", "model.norm", "embed_tokens"]}
    Run.adopt(tmp_path / "stock" / "checkpoint-2", tmp_path / "run", settings=settings)
    state = stock.open_state(tmp_path / "run")
    stock.assert_equal(stock.trained(whole), stock.trained(state.model))
    stock.assert_equal(stock.moments(whole, trainer.optimizer), stock.moments(state.model, state.optimizer))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_no_text_reaches_are_adopted_with_the_others(method: str, tmp_path: Path) -> None:
    """A Trainer's optimizer lists them and keeps nothing for them; all other moments are taken bit for bit."""
    base = tmp_path / "base"
    small.small_model("bart").save_pretrained(base)
    tiny.byte_tokenizer().save_pretrained(base)
    whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trained: Any = stock.lora_model(base, base=whole, target_modules="all-linear") if method == "lora" else whole
    trainer = stock.trainer(
        trained, tmp_path / "stock", processing_class=tiny.byte_tokenizer(), max_steps=2, save_strategy="steps",
        save_steps=2, weight_decay=0.1 * (method == "full"),
    )  # fmt: skip
    trainer.train()
    told: list[str] = []
    settings: dict[str, Any] = {"max_length": 128, "evaluation": {"share": 0}, "schedule": "constant"}
    run = Run.adopt(tmp_path / "stock" / "checkpoint-2", tmp_path / "run", settings=settings, report=told.append)
    assert [] != [line for line in told if line.startswith("no row of text reaches")]
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        found = Findings.of(ledger.get(FACT))
    assert found is not None
    state = stock.open_state(tmp_path / "run", found.treatment)
    moments = stock.moments(state.model, state.optimizer)
    dead = {name: moments.pop(name) for name in list(moments) if "encoder_attn.k_proj" in name}
    assert (method == "lora") is bool(dead)
    assert {0.0, 2.0} >= {float(each) for value in dead.values() for each in value.flatten()}
    theirs = stock.moments(trained, trainer.optimizer)
    stock.assert_equal(theirs, {name: moments[name] for name in theirs})
    run.train(tiny.write_jsonl(tmp_path / "file.jsonl", tiny.chat_rows(8)))
    assert run.verify().ok
