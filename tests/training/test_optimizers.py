"""Every optimizer method describes its optimizer truly, and nothing else needs to know it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onward.config import Config
from onward.errors import DamagedState
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.loading import load_moments, read_optimizer
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.optimizers import ADAMW, AdamW, OptimizerMethod, file_state, saved_count
from onward.training.state import TrainState

STEPS = 3


class Adamax(AdamW):
    """A method that is not registered: other slots, everything else as it is."""

    name = "adamax"
    slots = ("exp_avg", "exp_inf")

    def build(self, model: nn.Module, config: Config) -> Any:
        """Return Adamax over the same groups."""
        optimizer = torch.optim.Adamax([{"params": [p for _, p in group]} for group in self.groups(model)], lr=1e-3)
        self.configure(optimizer, config)
        return optimizer


METHODS: Mapping[str, OptimizerMethod] = {"adamw": ADAMW, "adamax": Adamax()}
"""Another one is in `test_eight_bits.py`: it needs a package."""


def make_state(model: Path, method: OptimizerMethod, *, steps: int) -> TrainState:
    """Return a state of full training that has taken some steps."""
    config = Config.model_validate({"model": str(model), "method": "full"})
    built = build_model(ModelSpec(config, model, torch.device("cpu"), torch.float32))
    state = TrainState(built, method.build(built, config), method)
    torch.manual_seed(0)
    for _ in range(steps):
        for parameter in state.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
    return state


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_its_optimizer_keeps(name: str, model: Path) -> None:
    """Slots, counter, order, count and bytes are those of the optimizer that it builds."""
    method = METHODS[name]
    view = make_state(model, method, steps=STEPS).view()
    assert {frozenset({method.counter, *method.slots})} == {frozenset(entry) for entry in view.moments.values()}
    kept = [entry[slot] for entry in view.moments.values() for slot in method.slots]
    assert sum(tensor.nbytes for tensor in kept) == method.bytes(view.weights)
    assert view.size == method.bytes(view.weights) + sum(weight.nbytes for weight in view.weights.values())
    assert STEPS == view.adam_step()
    assert list(view.weights) == list(view.moments)


@pytest.mark.parametrize("steps", [0, STEPS])
@pytest.mark.parametrize("name", METHODS)
def test_a_state_is_copied_saved_and_loaded_by_its_method(name: str, steps: int, model: Path, tmp_path: Path) -> None:
    """A copy, its file and a state that loads it have the same digest, for a method that nothing else knows too."""
    method = METHODS[name]
    copied = make_state(model, method, steps=steps).snapshot()
    huggingface.save(file_state(method, copied.optimizer), tmp_path / "optimizer.pt")
    assert steps == saved_count(method, read_optimizer(tmp_path / "optimizer.pt", mapped=True))
    fresh = make_state(model, method, steps=0)
    load_moments(fresh, tmp_path / "optimizer.pt")
    assert copied.digest().moments == fresh.view().digest().moments


def test_the_state_of_another_method_is_refused(model: Path, tmp_path: Path) -> None:
    """Moments are never taken for those of another method, in either direction."""
    for saved, loading in (("adamax", "adamw"), ("adamw", "adamax")):
        huggingface.save(make_state(model, METHODS[saved], steps=1).view().optimizer, tmp_path / "optimizer.pt")
        with pytest.raises(DamagedState, match="has no AdamW moments"):
            load_moments(make_state(model, METHODS[loading], steps=0), tmp_path / "optimizer.pt")


def test_parameters_that_disagree_have_no_count() -> None:
    """Counters that differ, or are missing for some parameters, are no count."""
    one, two = {"step": torch.tensor(1.0)}, {"step": torch.tensor(2.0)}
    assert 0 == ADAMW.count([], 2)
    assert 1 == ADAMW.count([one, one], 2)
    assert -1 == ADAMW.count([one, two], 2)
    assert -1 == ADAMW.count([one], 2)
