"""N files equal one run, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import FULL_SIZE
from processes import train
from runs import new_run
from states import assert_same_state, read_state

from onward import Run
from onward.config import Config
from onward.errors import ConfigError
from onward.training.schedule import learning_rate

LENGTHS = (12, 29, 7)
OWN_PROCESSES = ("lora", "full")
"""Variants whose files are trained by processes of their own; those of the others are by runs opened anew."""
SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "save_steps": 7,
    "max_length": 256,
    "lora": {"rank": 4, "dropout": 0.1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "accumulation": {"gradient_accumulation": 3},
    "epochs": {"epochs": 2, "batch_size": 8},
    "full": {"method": "full", "learning_rate": 1e-3, "weight_decay": 0.1},
    "odd": {"batch_size": 7, "schedule": "inverse_sqrt"},
    "rewarm": {"boundary": "rewarm"},
    "reset": {"boundary": "reset_moments"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of unequal length."""
    folder = tmp_path_factory.mktemp("files")
    return [tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in LENGTHS]


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_processes_equal_one(variant: str, model: Path, files: list[Path], tmp_path: Path) -> None:
    """Three files trained by three processes give the state of three files trained by one, whatever the settings.

    Where the settings change nothing of what a process hands over, the run is only opened three times.
    """
    settings = {**SETTINGS, **VARIANTS[variant]}
    new_run(tmp_path / "one", model, **settings)
    new_run(tmp_path / "three", model, **settings)
    Run(tmp_path / "one").train(*files)
    for file in files:
        if FULL_SIZE or variant in OWN_PROCESSES:
            assert 0 == train(tmp_path / "three", [file])
        else:
            Run(tmp_path / "three").train(file)
    assert_same_state(tmp_path / "one", tmp_path / "three")

    config = Config.model_validate({"model": str(model), **settings})
    steps = [-(-rows // config.batch_size) * config.epochs for rows in LENGTHS]
    history = Run(tmp_path / "three").history()
    assert steps == [entry["steps"] for entry in history]
    assert [rows * config.epochs for rows in LENGTHS] == [entry["rows_trained"] for entry in history]
    assert ["bitwise"] * 3 == [entry["handover"] for entry in history]
    state = read_state(tmp_path / "three")
    assert sum(steps) == state["global_step"] == history[-1]["last_step"]
    assert {steps[-1] if variant == "reset" else sum(steps)} == state["adam"]
    rates = [learning_rate(config, entry["last_step"], entry["steps"]) for entry in history]
    assert rates == [entry["last_learning_rate"] for entry in history]
    assert Run(tmp_path / "three").verify().ok


@pytest.mark.slow
def test_command_line_equals_library(model: Path, files: list[Path], program: Path, tmp_path: Path) -> None:
    """The console command trains the same bits as the library: in a process from its start, and in a forked one."""
    for name in ("one", "two"):
        new_run(tmp_path / name, model, batch_size=8, max_length=256, lora={"dropout": 0.1, "rank": 4})
    assert 0 == train(tmp_path / "one", files[:2])
    for start, file in (([sys.executable, "-m", "onward"], files[0]), ([program], files[1])):
        subprocess.run([*start, "train", file, "--run", tmp_path / "two"], check=True)
    assert_same_state(tmp_path / "one", tmp_path / "two")
    subprocess.run([program, "verify", "--deep", "--run", tmp_path / "two"], check=True)


def test_accumulation_changes_memory_only(model: Path, tmp_path: Path) -> None:
    """A step cut into parts has the same rows, the same count of steps and, up to rounding, the same loss."""
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(24))
    losses: list[list[float]] = []
    for parts in (1, 4):
        run = new_run(tmp_path / str(parts), model, gradient_accumulation=parts, lora={"dropout": 0.0}, max_length=256)
        entry = run.train(file)[0]
        losses.append([entry["steps"], entry["first_loss"], entry["last_loss"]])
    assert losses[0][0] == losses[1][0] == 3
    assert losses[0][1:] == pytest.approx(losses[1][1:], rel=1e-5)


@pytest.mark.parametrize("steps", [10, 100] if FULL_SIZE else [10])
def test_steps_cross_powers_of_ten(steps: int, model: Path, tmp_path: Path) -> None:
    """Around steps 9/10 (`make soak`: 99/100 too) the kept checkpoint is the one with the highest number."""
    run = new_run(tmp_path / "run", model, batch_size=1, max_length=256, save_steps=9, keep_boundaries=2)
    first = tiny.write_jsonl(tmp_path / "first.jsonl", tiny.chat_rows(steps - 1, seed=1))
    run.train(first)
    assert [f"checkpoint-{steps - 1}"] == [path.name for path in run.layout.checkpoints()]
    run.train(tiny.write_jsonl(tmp_path / "second.jsonl", tiny.chat_rows(1, seed=2)))
    assert [f"checkpoint-{steps}"] == [path.name for path in run.layout.checkpoints()]
    assert steps == run.status()["global_step"] == read_state(run.layout.root)["global_step"]
    assert run.verify().ok


def test_file_of_one_row(model: Path, tmp_path: Path) -> None:
    """A file of one row trains one step and commits."""
    run = new_run(tmp_path / "run", model, max_length=256)
    (entry,) = run.train(tiny.write_jsonl(tmp_path / "one.jsonl", tiny.chat_rows(1)))
    assert (1, 1, 1, "done") == (entry["rows"], entry["rows_trained"], entry["steps"], entry["state"])
    assert "checkpoint-1" == run.status()["checkpoint"]


def test_a_used_horizon_is_never_stretched(model: Path, tmp_path: Path) -> None:
    """A file beyond `total_steps` waits; a longer horizon is refused; a constant rate lets it go on."""
    settings: dict[str, Any] = {"schedule": "linear", "total_steps": 5, "warmup_steps": 1, "batch_size": 4}
    run = new_run(tmp_path / "run", model, **settings, max_length=256)
    run.train(tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(12, seed=1)))
    with pytest.raises(ConfigError, match="this file at 6"):
        run.train(tiny.write_jsonl(tmp_path / "b.jsonl", tiny.chat_rows(12, seed=2)))
    assert (3, 1) == (run.status()["global_step"], run.status()["queue"])
    config = run.layout.config.read_text()
    run.layout.config.write_text(config.replace("total_steps: 5", "total_steps: 9"))
    with pytest.raises(ConfigError, match="from 5 to 9"):
        run.train()
    run.layout.config.write_text(config.replace('schedule: "linear"', 'schedule: "constant"'))
    run.train()
    assert [3, 6] == [entry["last_step"] for entry in run.history()]
    assert run.verify(deep=True).ok
