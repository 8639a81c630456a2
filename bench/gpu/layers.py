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
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from own_steps import WARM, onward_steps, onward_trainer
from record import RECORDS, emit
from shapes import SHAPES
from speed import onward_modules
from torch import nn
from turns import Prepared, present, wait

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


def child(shape: str, way: str) -> Prepared:
    """Start a process that calls `take_steps` in its turn."""
    command = [sys.executable, "-W", "ignore", __file__, shape, way, "--child"]
    own = {name: value for name, value in os.environ.items() if name != RECORDS}
    own.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return Prepared(command, own)


def found(process: Prepared) -> dict[str, Any]:
    """Let a process have its turn; returns what it found, or why it did not."""
    status = process.take_turn(PATIENCE)
    if status is None:
        return {"failed": f"not finished in {PATIENCE:.0f} s"}
    lines = [line for line in process.said().splitlines() if line.strip()] or ["it said nothing"]
    if status:
        return {"failed": lines[-1][:300]}
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def compare(shape: str, way: str, processes: Sequence[Prepared]) -> bool:
    """Report what two processes find one way; returns whether both found something."""
    first = found(processes[0])
    again = found(processes[1]) if "failed" not in first else first
    if "failed" in again:
        processes[1].end()
        emit("layers", shape=shape, way=way, failed=again["failed"])
        return False
    equal = first["digest"] == again["digest"]
    emit("layers", shape=shape, way=way, equal=equal, **{**first, "again": again["tokens_per_second"]})
    return True


def main() -> None:
    """Compare the ways, or be one of the processes."""
    shape, *asked = sys.argv[1:]
    if asked[-1:] == ["--child"]:
        wait(*onward_modules(shape), *(present("liger_kernel.transformers") if asked[0] == "liger" else ()))
        gc.freeze()  # as in speed.py
        print(json.dumps(take_steps(shape, asked[0])))
        return
    ways = asked or list(WAYS)
    pair = [child(shape, ways[0]) for _ in range(2)]  # both import; the second has done so when the first is timed
    wait()
    broken: list[str] = []
    for place, way in enumerate(ways):
        if place:
            pair = [child(shape, way) for _ in range(2)]
        if not compare(shape, way, pair):
            broken.append(way)
    if broken:
        sys.exit(f"not computed: {', '.join(broken)}")


if __name__ == "__main__":
    main()
