"""Whether ranks hold the same state: compared bit for bit, taken over from rank 0, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import call_on_ranks
from rows import tiny_model

from onward.config import Config
from onward.data.tokenized import Row
from onward.errors import OnwardError
from onward.ranks import place_here
from onward.training.ranks.forming import form
from onward.training.ranks.sameness import hold_same
from onward.training.state import Cursor, TrainState
from onward.training.steps.anchor import AnchorTerm

SIZE = 3


def state_of(steps: int, *, frozen: str | None = None) -> TrainState:
    """Return a state after some steps, of which one weight may be frozen; equal for equal arguments."""
    model = tiny_model("llama", "sdpa", tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != frozen)
    state = TrainState.start(model, Config.model_validate({"method": "full"}))
    for step in range(steps):
        for parameter in state.parameters.values():
            parameter.grad = torch.full_like(parameter, step + 1.0)
        state.optimizer.step()
        state.counters.step += 1
    state.cursor = Cursor(steps, "file", steps, 9)
    return state


def flipped(state: TrainState, *, moment: bool) -> TrainState:
    """Return the state with another last bit in one number."""
    own = state.parameters["lm_head.weight"]
    tensor = state.optimizer.state[own]["exp_avg"] if moment else own.detach()
    tensor.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
    return state


def fail() -> TrainState:
    """Raise what the load of a model may raise."""
    raise ValueError("no such file")


Make = Callable[[], TrainState]
Case = tuple[Make, Make, bool, bool]
"""How rank 0 and the others make their states, whether rank 2 followed all steps, and whether devices are equal."""
CASES: dict[str, Case] = {
    "the same": (lambda: state_of(2), lambda: state_of(2), True, True),
    "behind": (lambda: state_of(2), lambda: state_of(0), False, True),
    "ahead": (lambda: state_of(0), lambda: state_of(2), False, True),
    "unequal devices": (lambda: state_of(2), lambda: flipped(state_of(2), moment=False), True, False),
    "a bit of a weight": (lambda: state_of(2), lambda: flipped(state_of(2), moment=False), True, True),
    "a bit of a moment": (lambda: state_of(2), lambda: flipped(state_of(2), moment=True), True, True),
    "other weights": (lambda: state_of(2), lambda: state_of(2, frozen="lm_head.weight"), False, True),
    "no state": (lambda: state_of(2), fail, False, True),
}


def agree(folder: Path) -> None:
    """On each rank: leave what came of each case. Rank 1 has the state of rank 0 where rank 2 alone is to be named."""
    place = place_here()
    assert place is not None
    group = form(place, 60.0, print)
    told: dict[str, Any] = {}
    for name, (first, other, followed, is_uniform) in CASES.items():
        group.is_uniform = is_uniform
        is_apart = group.rank == 2 or (group.rank == 1 and name in ("behind", "ahead"))
        state: TrainState | None = None

        def make(build: Make = other if is_apart else first) -> TrainState:
            nonlocal state
            state = build()
            return state

        try:
            hold_same(make, group, None, followed=followed or not is_apart)
            assert state is not None
            told[name] = [*vars(state.view().digest()).values(), state.view().plain(), len(state.optimizer.state)]
        except (OnwardError, ValueError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {getattr(error, 'what', error)}"
    kept = 0 if group.rank else 1
    row = Row(np.arange(1, 6) * kept, np.ones(5, dtype=bool))
    anchor = AnchorTerm([row], torch.arange(12).reshape(1, 4, 3) * kept, torch.full((1, 4, 3), 0.5 * kept), 0.1)
    hold_same(lambda: state_of(0), group, anchor)
    told["anchor"] = [anchor.texts[0].ids.tolist(), anchor.ids.tolist(), anchor.logs.tolist()]
    group.end()
    (folder / str(place.rank)).write_text(json.dumps(told))


def test_all_ranks_hold_the_state_of_the_first(tmp_path: Path) -> None:
    """One that was made here is taken over from rank 0 if it differs; one that took the same steps on equal devices and
    differs in a bit is faulty, and every rank ends with which one it is."""
    assert [0] * SIZE == call_on_ranks(agree, SIZE, tmp_path)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(SIZE)]
    for name in ("the same", "behind", "ahead", "unequal devices"):
        state = CASES[name][0]()
        view = state.view()
        expected = [view.digest().weights, view.digest().moments, view.plain(), len(state.optimizer.state)]
        assert [expected] * SIZE == [told[name] for told in found], name
    faulty = "VerificationFailed: rank 2 took the same steps as rank 0 and holds another state after step 2"
    other = "ModelError: rank 2 has different weights to train from rank 0"
    for told in found:
        assert [faulty, faulty, other] == [
            told[name] for name in ("a bit of a weight", "a bit of a moment", "other weights")
        ]
        assert [[1, 2, 3, 4, 5], [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]], [[[0.5] * 3] * 4]] == told["anchor"]
    failed = "RuntimeError: rank 2: ValueError: no such file"
    assert [failed, failed, "ValueError: no such file"] == [told["no state"] for told in found]
