"""How a decoder's norms, rotations and activations are computed: which way is faster, and whether its bits repeat.

`layers.py SHAPE [WAY ...]` takes the same steps in each way, twice, each time in a process of its own, and compares the
resulting weights. `layers.py SHAPE WAY --child` is one of these processes.

| way | what |
|---|---|
| kernels | Onward's own kernels for norm, rotation and SwiGLU; what it does |
| eager | as transformers computes them |
| norms | each norm by `torch.compile`, for any number of tokens |
| layers | each decoder layer by `torch.compile`, for any number of tokens |
| liger | Liger's kernels for norm, rotation and SwiGLU |

Nothing is autotuned: a choice by timing may differ in the next process.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from record import RECORDS, emit
from shapes import SHAPES
from speed import onward_steps, onward_trainer
from torch import nn

WARM = 3
PATIENCE = 70.0
"""Seconds of one process."""


def as_built(model: nn.Module) -> None:
    """Leave everything as it is."""


def norms(model: nn.Module) -> None:
    """Compile every RMSNorm."""
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.compile(dynamic=True)


def layers(model: nn.Module) -> None:
    """Compile every decoder layer."""
    for part in model.modules():
        if type(part).__name__.endswith("DecoderLayer"):
            part.compile(dynamic=True)


def liger(model: nn.Module) -> None:
    """Put Liger's kernels in, but not its loss: Onward's head has one of its own."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    from onward.training.model.load import causal_lm

    wanted = {"rope": True, "rms_norm": True, "swiglu": True}
    _apply_liger_kernel_to_instance(
        model=causal_lm(model), cross_entropy=False, fused_linear_cross_entropy=False, **wanted
    )


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "kernels": as_built, "eager": as_built, "norms": norms, "layers": layers, "liger": liger,
}  # fmt: skip


def take_steps(shape: str, way: str) -> dict[str, Any]:
    """Return how fast steps of mixed rows are one way, and the digest of the weights after them."""
    from onward.training.state import digest_tensors

    trainer = onward_trainer(shape, "lora", fused=way == "kernels")
    trainer.economy.record_nothing()  # what is compared is the kernels, and the host that launches them
    WAYS[way](trainer.state.model)
    begun = time.perf_counter()
    taken = list(onward_steps(trainer, shape, "mixed", SHAPES[shape].steps))
    seconds = statistics.median(each for each, _ in taken[WARM:])
    return {
        "tokens_per_second": sum(tokens for _, tokens in taken[WARM:]) / sum(each for each, _ in taken[WARM:]),
        "step": seconds,
        "start": time.perf_counter() - begun - sum(each for each, _ in taken[WARM:]),
        "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "digest": digest_tensors(sorted(trainer.state.view().weights.items())),
    }


def child(shape: str, way: str) -> dict[str, Any]:
    """Run `take_steps` in a process of its own; returns what it found, or why it did not."""
    command = [sys.executable, "-W", "ignore", __file__, shape, way, "--child"]
    own = {name: value for name, value in os.environ.items() if name != RECORDS}
    own.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished in {PATIENCE:.0f} s"}
    lines = done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return json.loads(last) if done.returncode == 0 else {"failed": last[:300]}


def main() -> None:
    """Compare the ways, or be one of the processes."""
    shape, *asked = sys.argv[1:]
    if asked[-1:] == ["--child"]:
        gc.freeze()  # as in speed.py
        print(json.dumps(take_steps(shape, asked[0])))
        return
    broken: list[str] = []
    for way in asked or WAYS:
        first = child(shape, way)
        again = child(shape, way) if "failed" not in first else first
        if "failed" in again:
            emit("layers", shape=shape, way=way, failed=again["failed"])
            broken.append(way)
            continue
        equal = first["digest"] == again["digest"]
        emit("layers", shape=shape, way=way, equal=equal, **{**first, "again": again["tokens_per_second"]})
    if broken:
        sys.exit(f"not computed: {', '.join(broken)}")


if __name__ == "__main__":
    main()
