"""The schedule and the settings of a Trainer: gone on with, or asked for where no run has them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny
import torch
from commands import onward
from stock import HORIZON, STEPS, Saved

from onward import Run
from onward.errors import ConfigError

SETTINGS: dict[str, Any] = {"evaluation": {"share": 0}, "max_length": 128}


def test_a_finished_schedule_asks_how_to_go_on(model: Path, tmp_path: Path) -> None:
    """At the Trainer's last step the schedule has ended: said, refused at the next file, and settable."""
    trainer = stock.trainer(stock.lora_model(model), tmp_path / "stock", max_steps=STEPS, save_strategy="steps")
    trainer.train()
    finished = tmp_path / f"stock/checkpoint-{STEPS}"
    lines: list[str] = []
    run = Run.adopt(finished, tmp_path / "run", str(model), settings=SETTINGS, report=lines.append)
    assert "schedule (linear) is finished: step 5 was its last of 5" in lines[-1]
    file = tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(8))
    with pytest.raises(ConfigError, match="schedule linear ends at step 5"):
        run.train(file)
    settings = {**SETTINGS, "schedule": "constant", "learning_rate": 1e-4}
    again = Run.adopt(finished, tmp_path / "again", str(model), settings=settings, report=lines.append)
    assert "step 6: 0.0001 (the Trainer's: unknown)" in lines[-1]
    again.train(file)
    assert STEPS + 2 == again.status()["global_step"]


def test_a_schedule_that_no_run_has_asks_how_to_go_on(model: Path, tmp_path: Path) -> None:
    """It is refused with a command that continues at its last rate; that command works."""
    settings: dict[str, Any] = {
        "max_steps": HORIZON, "callbacks": [stock.StopAt(2)], "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 2.0},
    }  # fmt: skip
    stock.trainer(stock.lora_model(model), tmp_path / "stock", **settings).train()
    folder = tmp_path / "stock/checkpoint-2"
    refused = onward("adopt", folder, "--run", tmp_path / "run", "--model", model)
    assert 2 == refused.status
    assert "the Trainer's schedule (polynomial, now at 4.51" in refused.err
    command = re.search(r"onward (adopt .* --set learning_rate=[^\s)]+)", refused.err)
    assert command is not None
    words = shlex.split(command[1].replace("NEW_RUN", str(tmp_path / "run")))
    assert 0 == onward(*words, "--model", model).status
    assert "constant" == Run(tmp_path / "run").config.schedule


def test_what_the_trainer_had_is_the_runs(model: Path, saved: Saved, tmp_path: Path) -> None:
    """Batch, accumulation, clipping, seed and schedule are taken, and the next learning rates are the Trainer's."""
    lines: list[str] = []
    run = Run.adopt(saved.folder, tmp_path / "run", str(model), settings=SETTINGS, report=lines.append)
    config = run.config
    assert (8, 2, 1.0, 42) == (config.batch_size, config.gradient_accumulation, config.max_grad_norm, config.seed)
    assert ("linear", 2, HORIZON, 1) == (
        config.schedule, config.warmup_steps, config.total_steps, config.schedule_offset
    )  # fmt: skip
    rate = torch.load(saved.folder / "scheduler.pt", weights_only=True)["_last_lr"][0]
    assert f"step {STEPS + 1}: {rate:.6g} (the Trainer's: {rate:.6g})" in lines[-1]
    assert any("(4 rows per device, 2 accumulated, 1 device)" in line for line in lines)
    run.train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(12)))
    following = HORIZON - STEPS - 2  # steps that a Trainer, which would resume now, has left in its schedule
    (folder,) = run.layout.checkpoints()
    for name, key in (("optimizer.pt", "lr"), ("scheduler.pt", "_last_lr")):
        found = torch.load(folder / name, weights_only=True)
        rates = [group[key] for group in found["param_groups"]] if key == "lr" else found[key]
        assert [config.learning_rate * following / (HORIZON - 2)] * 2 == rates
    again = Run(run.layout.root)
    again.train(tiny.write_jsonl(tmp_path / "again.jsonl", tiny.chat_rows(8, seed=5)))
    assert ["bitwise", "bitwise"] == [entry["handover"] for entry in again.history()]
    assert again.verify().ok
