"""Loads the TrainState of a checkpoint, and an optimizer's state from any `optimizer.pt`."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from onward.config import Config
from onward.errors import DamagedState, Unreadable, first_line
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.checkpoint import Manifest
from onward.training.device.errors import is_of_the_device
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.model.treatment import Treatment
from onward.training.optimizers import Entry, saved_groups, set_learning_rate
from onward.training.state import TrainState


class Cut(Protocol):
    """The part of one weight that this process has."""

    @property
    def weight(self) -> torch.Tensor:
        """The weight, with the shape of the whole."""
        ...

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return a copy of the same part of another tensor with that shape."""
        ...


def load_state(folder: Path, manifest: Manifest, spec: ModelSpec, *, treatment: Treatment | None = None) -> TrainState:
    """Build the TrainState of a verified checkpoint.

    Args:
        treatment: what the model's admission found; None for a run made before there was one.

    Raises:
        DamagedState: names, shapes or types are not those of the manifest.
        Unreadable: a file cannot be read now.
    """
    model = build_model(spec, checkpoint=folder, treatment=treatment)
    state = TrainState.start(model, spec.config)
    load_rest(state, state.view().describe_parameters(), folder, manifest, spec.config)
    return state


def load_rest(
    state: TrainState, parameters: Mapping[str, Any], folder: Path, manifest: Manifest, config: Config,
    shards: Mapping[str, Cut] | None = None,
) -> None:  # fmt: skip
    """Load all that a checkpoint holds besides the weights, which the state has.

    Args:
        parameters: shape and type of the state's whole weights by name, which have to be those of the checkpoint.
        shards: as for `load_moments`.

    Raises:
        DamagedState: names, shapes or types are not those of the manifest.
        Unreadable: a file cannot be read now.
    """
    if parameters != manifest.parameters:
        raise DamagedState("the model's trained parameters are not those of the checkpoint", where=folder)
    load_moments(state, folder / huggingface.OPTIMIZER, shards)
    state.method.configure(state.optimizer, config)
    set_learning_rate(state.optimizer, manifest.measurement["learning_rate"])  # the file's is for a Trainer
    state.load_plain(manifest.state)


def read_optimizer(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Return the content of an `optimizer.pt`.

    Args:
        mapped: read tensors only when they are accessed, for callers that need only a few.

    Raises:
        DamagedState: the file is missing, or was not written by `torch.save` with only tensors and plain values.
        Unreadable: the file cannot be read now.
    """
    try:
        return cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except FileNotFoundError:
        raise DamagedState("the optimizer's state is missing", where=path) from None
    except Exception as error:
        refused = refused_read(error)
        if refused is not None:
            raise Unreadable.of(refused, path) from None
        if is_of_the_device(error):
            raise
        raise DamagedState(f"the optimizer's state is damaged: {first_line(error)}", where=path) from None


def refused_read(error: Exception) -> OSError | None:
    """Return the system's refusal of a read in an error of `torch.load`; None if the file's content is to blame."""
    refused = error if isinstance(error, OSError) else error.__context__  # PyTorch's reader hides it behind its own
    if isinstance(refused, OSError) and refused.errno != errno.EINVAL:  # in a torn file it seeks to before its start
        return refused
    return None


def load_moments(state: TrainState, path: Path, shards: Mapping[str, Cut] | None = None) -> None:
    """Load the optimizer's state from an `optimizer.pt`, checking count, names and shapes for each parameter.

    Args:
        shards: the shards that make up the state; each takes its part of whole tensors, which are read one at a time.

    Raises:
        DamagedState: the file does not contain the state of the same method for exactly these parameters.
        Unreadable: the file cannot be read now.
    """
    saved = read_optimizer(path, mapped=shards is not None)
    try:
        groups = saved_groups(saved)
        order = [index for group in groups for index in group["params"]]
        held = cast(dict[int, Mapping[str, Any]], saved["state"])
        entries = {int(index): state.method.from_file(entry) for index, entry in held.items()}
        rates = [float(group["lr"]) for group in groups]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedState(f"this is not the state of an optimizer: {type(error).__name__}", where=path) from None
    sizes = [len(group["params"]) for group in groups]
    expected = [len(group["params"]) for group in state.optimizer.param_groups]
    if sizes != expected:
        raise DamagedState(f"the optimizer has parameter groups of {sizes}, the model of {expected}", where=path)
    names = dict(zip(order, state.parameters, strict=True))
    whole = state.parameters if shards is None else {name: shard.weight for name, shard in shards.items()}
    _require_entries(state, {index: (name, whole[name]) for index, name in names.items()}, entries, path)
    own = state.optimizer.state_dict()["param_groups"]
    for group, rate, saved_group in zip(own, rates, groups, strict=True):
        group.update(lr=rate, params=saved_group["params"])
    cuts = {index: torch.clone if shards is None else shards[name].cut for index, name in names.items()}
    copies = {
        index: {key: (value.clone() if value.ndim == 0 else cuts[index](value)) for key, value in entry.items()}
        for index, entry in entries.items()
    }
    state.optimizer.load_state_dict({"state": copies, "param_groups": own})


def _require_entries(
    state: TrainState, parameters: Mapping[int, tuple[str, torch.Tensor]], entries: Mapping[int, Entry], path: Path
) -> None:
    """Refuse entries that do not fit; an optimizer that has taken no step has no entries at all."""
    for index, (name, parameter) in parameters.items() if entries else ():
        problem = state.method.problem(parameter, entries.get(index))
        if problem is not None:
            raise DamagedState(f"{name}: {problem}", where=path)
