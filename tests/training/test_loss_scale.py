"""float16 with a scale of the loss: state like any other, and no step is left out."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny
import torch
from processes import apart, train
from rows import CPU, batch, tiny_model
from runs import new_run
from states import assert_same_state
from torch import nn

from onward import Run
from onward.config import Config
from onward.data.plan.order import FilePlan, RowReference
from onward.errors import DamagedState, TrainingError
from onward.events import StepTaken
from onward.layout import RunLayout
from onward.training.device.execution import Execution
from onward.training.foreign.scaler import read_scale
from onward.training.layers.attention import ROW_ATTENTION
from onward.training.loss_scale import FIRST, LARGEST, LEAST, PATIENCE, LossScale
from onward.training.state import Cursor, TrainState
from onward.training.trainer import Trainer
from onward.training.world import SingleProcess

STEPS = 3
SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "dtype": "float16",
    "batch_size": 2,
    "max_length": 64,
    "save_steps": 1,
    "lora": {"rank": 4, "dropout": 0.1},
}


PLAN = FilePlan("scale", rows=8, batch_size=1, epochs=100, seed=0)
"""A plan of a file, whose rows are given by hand."""


def trainer_of(scale: LossScale, method: str = "full") -> Trainer:
    """Return a trainer of a small model in float16, its loss scaled so."""
    config = Config.model_validate({"dtype": "float16", "learning_rate": 1e-3, "method": method})
    state = TrainState.start(tiny_model("llama", ROW_ATTENTION), config)
    state.cursor, state.scale = Cursor(1, "scale", 0, PLAN.steps), scale
    return Trainer(state, config, Execution(SingleProcess(CPU), torch.float16))


def take(trainer: Trainer, steps: int = STEPS, files: str = "scale scale scale") -> list[StepTaken]:
    """Take steps of three rows of unequal length, of these files."""
    references = [RowReference(file, place) for place, file in enumerate(files.split())]
    batches = [replace(batch(9, 31, 5, seed=seed), references=references) for seed in range(steps)]
    return [trainer.take_step(each, PLAN) for each in batches]  # type: ignore[arg-type]


def test_a_step_that_overflows_is_taken_again_with_half_the_scale() -> None:
    """No row is lost: losses, weights, moments and counters are those of a run that began with the scale that held."""
    high = trainer_of(LossScale(LARGEST))
    taken = take(high)
    held = high.state.scale
    assert held is not None
    assert LEAST < held.value < LARGEST
    assert STEPS == held.steps == high.state.view().adam_step() == high.state.step
    assert sum(step.rows for step in taken) == high.state.counters.rows
    low = trainer_of(LossScale(held.value))
    again = take(low)
    assert [(step.loss, step.grad_norm) for step in again] == [(step.loss, step.grad_norm) for step in taken]
    assert high.state.view().digest() == low.state.view().digest()


def test_a_scale_changes_digits_only_where_numbers_are_tiny() -> None:
    """Scales are powers of two, so gradients of one step are close whatever the scale, and those of float32 too."""
    norms = [take(trainer_of(LossScale(value)), 1)[0].grad_norm for value in (256.0, 512.0)]
    config = Config.model_validate({"dtype": "float32", "learning_rate": 1e-3, "method": "full"})
    state = TrainState.start(tiny_model("llama", ROW_ATTENTION), config)
    state.cursor = Cursor(1, "scale", 0, PLAN.steps)
    exact = take(Trainer(state, config, Execution(SingleProcess(CPU), torch.float32)), 1)[0].grad_norm
    assert state.scale is None
    assert [True, True] == [abs(norm / exact - 1) < 1e-2 for norm in norms]


def test_a_gradient_that_no_scale_makes_finite_fails_the_step() -> None:
    """The step is refused with its rows; scale, weights and counters are those before it."""
    trainer = trainer_of(LossScale(8.0, 5))
    before = trainer.state.view().digest()
    weight = next(iter(trainer.state.parameters.values()))
    tries: list[int] = []
    weight.register_hook(lambda gradient: tries.append(1) or gradient * float("inf"))
    with pytest.raises(TrainingError, match="the gradient of step 1 is not finite"):
        take(trainer, 1)
    assert 4 == len(tries)  # with 8, 4, 2 and 1
    assert (LossScale(8.0, 5), 0) == (trainer.state.scale, trainer.state.step)
    assert before == trainer.state.view().digest()


def test_a_loss_that_is_not_finite_is_not_tried_again() -> None:
    """The scale has no part in it. Lines are those of the file; of replayed rows only their number is told."""
    trainer = trainer_of(LossScale())
    calls: list[int] = []
    with torch.no_grad():
        next(iter(trainer.state.parameters.values())).fill_(float("nan"))
    part = nn.Module.get_submodule(trainer.state.model, "model.layers.0")
    part.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(TrainingError, match=r"the loss of step 1 is not finite .* its rows are on lines 0, 1, 2 \["):
        take(trainer, 1)
    assert 1 == len(calls)
    with pytest.raises(TrainingError, match="its rows are on line 1 and 2 of earlier files"):
        take(trainer, 1, "other scale other")
    with pytest.raises(TrainingError, match="its rows are 3 of earlier files"):
        take(trainer, 1, "other other other")


def test_the_scale_moves_as_that_of_pytorch_does() -> None:
    """Its file is that of GradScaler, which finds the same scale after the same overflows."""
    theirs = torch.amp.GradScaler("cpu", growth_interval=PATIENCE)
    theirs.load_state_dict(LossScale(64.0, PATIENCE - 3).to_file())
    ours = LossScale(64.0, PATIENCE - 3)
    seen: list[tuple[float, float]] = []
    for overflows in (False, False, False, True, False, True, True, False):
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        theirs.scale(weight.sum()).backward()
        assert weight.grad is not None
        weight.grad *= float("inf") if overflows else 1.0
        theirs.step(optimizer)
        theirs.update()
        ours = ours.halved() if overflows else ours.after_step()
        seen.append((theirs.get_scale(), ours.value))
    assert [scale for scale, _ in seen] == [scale for _, scale in seen]
    assert theirs.state_dict() == ours.to_file()
    assert ours == LossScale.from_file(theirs.state_dict())


def test_a_scale_has_bounds() -> None:
    """It neither vanishes nor grows beyond what float32 holds of it."""
    assert LossScale(LARGEST) == LossScale(LARGEST, PATIENCE - 1).after_step()
    assert not LossScale(LEAST).can_fall
    assert LossScale(LEAST) == LossScale(LEAST).halved()


@pytest.mark.slow
def test_files_in_float16_are_one_run(model: Path, tmp_path: Path) -> None:
    """Three processes, one of them killed, end with the bits and the scale of one; a replay gives them again."""
    files = [tiny.write_jsonl(tmp_path / f"{seed}.jsonl", tiny.chat_rows(6, seed=seed)) for seed in (1, 2)]
    one, many = (new_run(tmp_path / name, model, **SETTINGS) for name in ("one", "many"))
    assert 0 == train(one.layout.root, files)
    one_by_one(many.layout.root, files)
    assert_same_state(one.layout.root, many.layout.root)
    states = [stock.open_state(run.layout.root) for run in (one, many)]
    assert 6 == states[0].step
    scale = states[0].scale
    assert scale is not None
    assert states[1].scale == scale
    assert (FIRST, 6) == (scale.value, scale.steps) or scale.value < FIRST
    assert states[0].view().digest() == states[1].view().digest()
    assert scale == read_scale(one.layout.checkpoints()[0])
    assert [] == [check.detail for check in many.verify(deep=True).checks if not check.ok]


def one_by_one(root: Path, files: list[Path]) -> None:
    """Train files in processes of their own, the first one killed after two steps."""
    assert -signal.SIGKILL == apart(_killed, root, files[0])
    assert [0, 0] == [train(root), train(root, files[1:])]


def _killed(root: Path, file: Path) -> None:
    torch.set_num_threads(1)

    def observe(event: object) -> None:
        if isinstance(event, StepTaken) and event.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Run(root).train(file, observe=observe)


def test_a_run_goes_on_with_the_scale_of_a_trainer(model: Path, tmp_path: Path) -> None:
    """Adopted with `dtype: float16`, its `scaler.pt` is the state's; a file that is none of it is refused."""
    saved = stock.save_lora(model, tmp_path / "stock")
    torch.save(LossScale(1024.0, 7).to_file(), saved.folder / "scaler.pt")
    run = Run.adopt(saved.folder, tmp_path / "run", str(model), settings={"dtype": "float16"})
    assert LossScale(1024.0, 7) == stock.open_state(tmp_path / "run").scale
    assert run.verify().ok
    torch.save({"scale": "much"}, saved.folder / "scaler.pt")
    with pytest.raises(DamagedState, match="not the state of a GradScaler"):
        Run.adopt(saved.folder, tmp_path / "refused", str(model), settings={"dtype": "float16"})
    assert not RunLayout(tmp_path / "refused").ledger.exists()
