"""Checkpoints behind training: what one costs in steps, against a copy of its bytes and against the stock Trainer.

`python bench/stall.py` trains the full 15M model, once without commits inside the file and once with one every ten
steps, and times the copy that training waits for.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import torch

from onward.config import Config
from onward.training.device.environment import pick_device, pick_dtype
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.state import TrainState

STEPS, EVERY = 34, 10
ROUNDS = {"onward": 3, "trainer": 1}
NEVER = 10**6
LOSS_GOAL, COPY_GOAL = 0.02, 1.3
STEPS_SCRIPT = Path(__file__).with_name("steps.py")


def measure(work: Path, *, steps: int = STEPS) -> dict[str, Any]:
    """Return the loss of throughput with a commit every ten steps, for both sides, and the stall of one.

    A step's time is the median over all rounds: two runs of the same steps differ by more than commits cost.
    """
    model = measuring.small_llama(work / "model")
    rows = measuring.mixed_rows(work / "rows.jsonl", None, steps * 8)

    def seconds(side: str, every: str) -> list[float]:
        records = measuring.child(STEPS_SCRIPT, side, model, rows, steps, "full", every)
        return [record["seconds"] for record in records[EVERY // 2 :]]

    loss: dict[str, float] = {}
    spread: dict[str, dict[str, float]] = {}
    for side, rounds in ROUNDS.items():
        found = measuring.interleaved([str(NEVER), str(EVERY)], rounds, partial(seconds, side))
        plain, saving = found.values()
        spread[side] = measuring.spread([sum(s) / sum(p) - 1 for p, s in zip(plain, saving, strict=True)])
        loss[side] = _usual(saving) / _usual(plain) - 1
    return {
        "steps": steps,
        "save_steps": EVERY,
        "rounds": ROUNDS,
        "throughput_loss": loss,
        "throughput_loss_of_single_rounds": spread,
        "loss_of_throughput": measuring.held_against(LOSS_GOAL, loss["onward"], at_most=True),
        "stall": measuring.child(Path(__file__), "copy", model),
    }


def _usual(runs: list[list[float]]) -> float:
    """Return the seconds of all steps, each at its median."""
    return sum(statistics.median(step) for step in zip(*runs, strict=True))


def measure_copy(model: Path) -> dict[str, Any]:
    """Return the seconds of the copy that training waits for and of a plain `memcpy` of the same bytes."""
    device = pick_device()
    measuring.tune_process()
    config = Config.model_validate({"model": str(model), "method": "full"})
    state = TrainState.start(build_model(ModelSpec(config, model, device, pick_dtype("auto", device))), config)
    for parameter in state.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    copy = state.snapshot()
    sources = [tensor.cpu() for tensor in copy.tensors()]
    flat = torch.cat([tensor.reshape(-1) for tensor in sources])
    target = torch.empty_like(flat)

    def timed(side: str) -> float:
        begun = time.perf_counter()
        if side == "state":
            state.snapshot(into=copy)
        else:
            target.copy_(flat)
        return time.perf_counter() - begun

    found = measuring.interleaved(["state", "memcpy"], 50, timed)
    ratio = statistics.median(found["state"]) / statistics.median(found["memcpy"])
    seconds = {side: measuring.spread(values) for side, values in found.items()}
    against = measuring.held_against(COPY_GOAL, ratio, at_most=True)
    return {"bytes": flat.numel() * 4, "seconds": seconds, "copy_against_memcpy": against}


def main() -> None:
    """Print the figures as JSON."""
    if sys.argv[1:2] == ["copy"]:
        print(json.dumps(measure_copy(Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder)), indent=2))


if __name__ == "__main__":
    main()
