"""Checkpoints that tests write without a run around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from onward.config import Config
from onward.training.checkpoints.checkpoint import Contents, Facts
from onward.training.measuring.handover import measure
from onward.training.measuring.probe import Probed
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.state import TrainState

CPU = torch.device("cpu")
RUN = "a run"


def make_contents(model: Path, *, run: str = RUN, steps: int = 1, **settings: Any) -> Contents:
    """Return what a checkpoint of a state is written from that has taken some steps."""
    config = Config.model_validate({"model": str(model), "lora": {"rank": 2}, **settings})
    state = TrainState.start(build_model(ModelSpec(config, model, CPU, torch.float32)), config)
    torch.manual_seed(0)
    for _ in range(steps):
        for parameter in state.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
    state.counters.step = steps
    view = state.view()
    facts = Facts(run, {"name": str(model), "digest": "d"}, "t", {"device": "cpu"}, {"tokenizer.json": b"{}"})
    return Contents(state.model, view, config, measure(view, Probed(1.0, "")), facts)


def make_state(contents: Contents) -> TrainState:
    """Return the state of a model with a fresh optimizer."""
    return TrainState.start(contents.model, contents.config)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its place."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
