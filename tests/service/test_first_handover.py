"""The handover of the state of step 0, whose probe is measured behind the first steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runs import new_run

from onward.config import Config
from onward.errors import VerificationFailed
from onward.events import Committed, FileStarted
from onward.service.owner.training.handing_over import Crossing, LateHandover
from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import inspect_checkpoint
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.state import TrainState

AT_FIRST = Crossing("boundary", 0, 1)
HERE = {"device": "cpu", "dtype": "float32", "deterministic": True}


@pytest.fixture
def state(model: Path) -> TrainState:
    """The state of step 0 of a tiny model."""
    config = Config.model_validate({"model": str(model)})
    return TrainState.start(build_model(ModelSpec(config, model, torch.device("cpu"), torch.float32)), config)


def test_it_is_kept_before_anything_later_is_committed(model: Path, tmp_path: Path) -> None:
    """The file begins with the class; the record has what was measured of the copy, and is there at each commit."""
    run = new_run(tmp_path / "run", model, batch_size=2, save_steps=1)
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(6))
    named: list[str] = []
    kept: dict[int, int] = {}

    def observe(event: object) -> None:
        if isinstance(event, FileStarted):
            named.append(event.handover)
        if isinstance(event, Committed):
            with Ledger(run.layout.ledger, read_only=True) as ledger:
                kept[event.step] = len(ledger.handovers())

    run.train(file, observe=observe)
    assert ["bitwise"] == named
    assert {1, 2, 3} <= set(kept)
    assert {1} == {count for step, count in kept.items() if step > 0}
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        (found,) = ledger.handovers()
    manifest = inspect_checkpoint(run.layout.boundary(0)).verified
    assert manifest is not None
    measured = manifest.measured
    assert ("boundary", 0, "bitwise", 0.0) == (found.kind, found.step, found.name, found.difference)
    assert measured == json.loads(found.before) == json.loads(found.after)
    assert measured["probe_loss"] > 0
    assert run.verify().ok


@pytest.mark.parametrize(
    ("change", "name"),
    [({}, "bitwise"), ({"deterministic": False}, "not deterministic"), ({"device": "mps"}, "close")],
    ids=["exact", "not exact", "Apple"],
)
def test_its_class_is_that_of_the_environment(change: Mapping[str, Any], name: str, state: TrainState) -> None:
    """Equal bits are only found where they are promised, as at any other boundary."""
    assert name == LateHandover.of_first(AT_FIRST, state.snapshot(), state, {**HERE, **change}).name


@pytest.mark.parametrize("place", ["state", "copy"])
def test_a_state_that_is_not_its_copy_trains_nothing(place: str, state: TrainState) -> None:
    """One bit of one weight of either side stops the run before its first step."""
    copied = state.snapshot()
    weights = state.view().weights if place == "state" else copied.weights
    next(iter(weights.values())).view(torch.int32).reshape(-1)[0] ^= 1
    with pytest.raises(VerificationFailed, match="weights"):
        LateHandover.of_first(AT_FIRST, copied, state, HERE)
