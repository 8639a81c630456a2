"""Checkpoints behind training: what one costs the steps, against a copy of its bytes and against the stock Trainer.

`python bench/stall.py` trains the 15M model whole, once without commits inside the file and once with one every ten
steps, and times the copy that training waits for.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
import torch

from onward.config import Config
from onward.training.environment import pick_device, pick_dtype, tune_memory
from onward.training.model import build_model
from onward.training.optim import build_optimizer
from onward.training.state import TrainState

STEPS, EVERY, ROUNDS = 40, 10, 3
NEVER = 10**6
LOSS_GOAL, COPY_GOAL = 0.02, 1.3
STEPS_SCRIPT = Path(__file__).with_name("steps.py")


def measure(work: Path, *, steps: int = STEPS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the loss of throughput with a commit every ten steps, for both sides, and the stall of one."""
    model = measuring.small_llama(work / "model")
    rows = measuring.mixed_rows(work / "rows.jsonl", None, steps * 8)
    sides = [f"{side} {every}" for side in ("onward", "trainer") for every in (NEVER, EVERY)]

    def seconds(side: str) -> float:
        name, every = side.split()
        records = measuring.child(STEPS_SCRIPT, name, model, rows, steps, "full", every)
        return sum(record["seconds"] for record in records[EVERY // 2 :])

    found = measuring.interleaved(sides, rounds, seconds)
    loss = {
        side: [
            with_commits / without - 1
            for without, with_commits in zip(found[f"{side} {NEVER}"], found[f"{side} {EVERY}"], strict=True)
        ]
        for side in ("onward", "trainer")
    }
    return {
        "steps": steps,
        "save_steps": EVERY,
        "throughput_loss": {side: measuring.spread(values) for side, values in loss.items()},
        "loss_of_throughput": measuring.held_against(LOSS_GOAL, statistics.median(loss["onward"]), at_most=True),
        "stall": measuring.child(Path(__file__), "copy", model),
    }


def measure_copy(model: Path) -> dict[str, Any]:
    """Return the seconds of the copy that training waits for and of a plain `memcpy` of the same bytes."""
    device = pick_device()
    tune_memory()
    config = Config.model_validate({"model": str(model), "method": "full"})
    state = TrainState(build_model(config, model, device, pick_dtype("auto", device)), None)  # type: ignore[arg-type]
    state.optimizer = build_optimizer(state.model, config)
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

    found = measuring.interleaved(["state", "memcpy"], 20, timed)
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
