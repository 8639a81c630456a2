"""Ensures that every rank holds the state of rank 0: compares before each file, and sends it where it differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from onward.errors import ModelError, VerificationFailed
from onward.training.state import TrainState
from onward.training.steps.anchor import AnchorTerm
from onward.training.world import World

Slot = tuple[int, str, list[int], str, str]
"""A tensor that an optimizer keeps: index of its weight, its name, shape, type and kind of device."""


def hold_same(
    make: Callable[[], TrainState], world: World, anchor: AnchorTerm | None, *, followed: bool = True
) -> None:
    """Compare the state with that of rank 0, take over rank 0's if it differs, and receive the anchor's tensors.

    Args:
        make: returns the state; what it raises is raised on every rank.
        followed: whether this rank took every step of the state, so that it must be the same bit for bit.

    Raises:
        VerificationFailed: a rank took every step but holds another state.
        ModelError: a rank has other weights to train.
    """
    if world.size == 1:
        return
    with world.together():
        state = make()
        own = {"mark": _mark(state), "followed": followed, "weights": state.view().describe_parameters()}
    found = world.share(own)
    _require_same_weights(found)
    others = [rank for rank, each in enumerate(found) if each["mark"] != found[0]["mark"]]
    wrong = [rank for rank in others if found[rank]["followed"]]
    if wrong and world.is_uniform:
        raise VerificationFailed(
            f"rank {wrong[0]} took the same steps as rank 0 and holds another state after step {state.step}",
            where="devices",
            hint="Its device or memory is faulty. What was committed is rank 0's; onward verify checks it.",
        )
    if others:
        _send_state(state, world)
    if anchor is not None:
        world.broadcast([*(torch.from_numpy(row.ids) for row in anchor.texts), anchor.ids, anchor.logs])


def _mark(state: TrainState) -> Any:
    """Return what ranks compare of their states: marks on a GPU, a digest on a CPU."""
    marks = state.marks()
    if marks is not None:
        return [int(mark) for mark in marks]
    digest = state.view().digest()
    return [digest.weights, digest.moments]


def _require_same_weights(found: list[Any]) -> None:
    for rank, each in enumerate(found):
        if each["weights"] != found[0]["weights"]:
            raise ModelError(
                f"rank {rank} has different weights to train from rank 0",
                where="model",
                hint="All ranks need the same base model and the same versions of transformers and peft.",
            )


def _send_state(state: TrainState, world: World) -> None:
    """Give every rank the weights and the optimizer's state of rank 0, and its counters and cursor."""
    view = state.view()
    slots: list[Slot] = world.share(_slots(state))[0]
    plain = world.share(view.plain())[0]
    world.broadcast(list(view.weights.values()))
    if world.rank == 0:
        held = view.optimizer["state"]
        world.broadcast([held[index][key] for index, key, *_ in slots])
        return
    weights = list(view.weights.values())
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for index, key, shape, dtype, kind in slots:
        device = weights[index].device if kind != "cpu" else torch.device("cpu")
        entries.setdefault(index, {})[key] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    world.broadcast([tensor for entry in entries.values() for tensor in entry.values()])
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    state.load_plain(plain)


def _slots(state: TrainState) -> list[Slot]:
    held = state.view().optimizer["state"]
    return [
        (index, key, list(value.shape), str(value.dtype).removeprefix("torch."), value.device.type)
        for index, entry in sorted(held.items())
        for key, value in sorted(entry.items())
    ]
