"""One side's steps on one shape, in a process of its own: `speed.py SIDE SHAPE KIND,KIND [METHOD]`.

`KIND` is `packed` (rows of 2,048 tokens), `mixed`, or `determinism`: packed rows with it and without. All sides train
the same tokens: 8 rows a step, AdamW, LoRA of rank 16 on all linear layers unless METHOD is `full`. The first steps are
not timed.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from own_steps import (
    WARM,
    batch_of,
    batches,
    endless_plan,
    hindrance,
    kept_by_recordings,
    onward_steps,
    onward_trainer,
    replayed,
    synchronize,
)
from record import emit
from shapes import SHAPES, base_model, config_of, device, dtype_of, model_modules
from turns import present, wait

SHORT = ("Qwen3-0.6B", "Qwen3-1.7B")
"""Shapes for which mixed parts are short enough to be replayed."""
SETTLED, TIMED = 60, 20
"""Steps of them after which Onward replays most sizes, and those that are timed then. What comes before is a cost that
each process has once; the page shows it."""
DETERMINISM = "determinism"
PEERS = {"trl": "trl padding-free", "trainer": "trainer"}
"""Sides, and how each takes rows that are not packed."""
BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
"""Dense bfloat16 operations a second by the vendor's data sheet; others have no share of their peak."""


def warm(kind: str, shape: str) -> int:
    """Return how many of Onward's steps are not timed."""
    return SETTLED if kind == "mixed" and shape in SHORT else WARM


def timed_steps(kind: str, shape: str) -> int:
    """Return how many of Onward's steps are timed."""
    return TIMED if kind == "mixed" and shape in SHORT else SHAPES[shape].steps


def onward_modules(shape: str) -> list[str]:
    """Return the modules that Onward's steps need, for a process that imports before its turn."""
    kernels = ["onward.training.layers.kernels"] if present("triton") else []
    return [*model_modules(shape), "onward.training.trainer", "onward.training.model.load", *kernels]


def peer_modules(shape: str) -> list[str]:
    """Return the modules that a peer's steps need."""
    own = ["onward.training.device.environment", "onward.data.tokenized", "peers"]
    trl = present("trl.trainer.sft_trainer", "liger_kernel.transformers")
    return [*model_modules(shape), "datasets", "transformers.trainer", *trl, *own]


def modules(side: str, shape: str) -> list[str]:
    """Return the modules that a side needs."""
    if side == "machine":
        return []
    return onward_modules(shape) if side == "onward" else peer_modules(shape)


def measure_onward(shape: str, kinds: Sequence[str], method: str) -> None:
    """Report how fast Onward's steps are, what they take, and what was estimated."""
    trainer = onward_trainer(shape, method)
    profile = trainer.economy.profile
    for kind in kinds:
        if kind == DETERMINISM:
            measure_determinism(trainer, shape)
            continue
        reset_peak()
        before = allocated()
        settled, timed = warm(kind, shape), timed_steps(kind, shape)
        steps = onward_steps(trainer, shape, kind, timed, settled)
        first = [round(seconds, 3) for seconds, _ in islice(steps, settled)]
        replays = replayed(trainer)
        records = list(steps)
        share, why = (replayed(trainer) - replays) / timed, hindrance(trainer)
        more = {"replayed": share, "kept": kept_by_recordings(), "hindrance": why, "first": first}
        say(f"onward {method}", shape, kind, records, method, part_tokens=trainer.config.part_tokens, **more)
        if torch.cuda.is_available():
            parts = largest_parts(trainer, shape, kind)
            estimate = max((profile.estimate(part) for part in parts), key=lambda each: each.total)
            peak = torch.cuda.max_memory_allocated()
            emit(
                "memory", shape=shape, kind=kind, method=method, estimate=estimate.total, measured=peak,
                before=before, off=abs(estimate.total / peak - 1), goal=0.15,
            )  # fmt: skip


def measure_determinism(trainer: Any, shape: str) -> None:
    """Report what determinism costs: steps with and without it in turn, so that both see the same machine."""
    exact = trainer.config
    trainer.economy.record_nothing()  # only what repeats can be replayed, and that would be compared then
    seconds: dict[bool, list[float]] = {True: [], False: []}
    plan = endless_plan()
    for place, rows in enumerate(batches(shape, "packed", 2 * (SHAPES[shape].steps + WARM))):
        wanted = place % 2 == 0
        trainer.accumulation.config = exact.model_copy(update={"deterministic": wanted})
        synchronize()
        begun = time.perf_counter()
        trainer.take_step(batch_of(rows), plan)
        synchronize()
        seconds[wanted].append(time.perf_counter() - begun)
    trainer.accumulation.config = exact
    median = {wanted: statistics.median(times[WARM:]) for wanted, times in seconds.items()}
    cost = 1.0 - median[False] / median[True]
    emit("determinism", shape=shape, cost=cost, seconds=median[True], loose=median[False], goal=0.10, met=cost <= 0.10)


def largest_parts(trainer: Any, shape: str, kind: str) -> list[list[int]]:
    """Return the lengths of the rows of each part that was trained, with the row that fills it up."""
    from onward.training.steps.parts import parts_of

    found: list[list[int]] = []
    for rows in batches(shape, kind, timed_steps(kind, shape) + warm(kind, shape)):
        for part in parts_of(batch_of(rows), trainer.config, 0, trainer.loss.layout):
            lengths = [len(row.ids) for row in part.batch.rows]
            sizes = trainer.loss.sizes(lengths, part.batch.target_tokens)
            found.append(lengths if sizes is None else [*lengths, sizes.tokens - sum(lengths)])
    return found


def measure_peer(side: str, shape: str, kind: str) -> None:
    """Report how fast a peer's steps are: `trl` with packed, padding-free rows and its chunked loss, or `trainer`."""
    import tempfile

    from peers import peer_trainer

    steps = SHAPES[shape].steps + WARM
    rows = [row for step in batches(shape, kind, steps) for row in step]
    with tempfile.TemporaryDirectory() as folder:
        reset_peak()
        trainer, settings = peer_trainer(side, base_model(shape, dtype_of(device())), rows, steps, folder)
        records: list[tuple[float, int]] = []
        inner = trainer.training_step
        begun = [time.perf_counter()]

        def training_step(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = int(mask.sum()) if mask is not None else int(inputs["input_ids"].numel())
            loss = inner(model, inputs, *rest)
            synchronize()
            records.append((time.perf_counter() - begun[0], tokens))
            begun[0] = time.perf_counter()
            return loss

        trainer.training_step = training_step
        trainer.train()
    attention = trainer.model.config._attn_implementation
    say(side, shape, kind, records[WARM:], "lora", settings=settings, attention=attention)


def say(side: str, shape: str, kind: str, records: list[tuple[float, int]], method: str, **more: Any) -> float:
    """Emit the figures of one side; return tokens per second over all timed steps."""
    tokens = sum(each for _, each in records)
    seconds = sum(each for each, _ in records)
    rate = tokens / seconds
    parameters = parameters_of(shape)
    peak = next((flops for name, flops in BF16_PEAK.items() if name in device_name()), None)
    share = None if peak is None else (6 if method == "full" else 4) * parameters * rate / peak
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    emit(
        "speed", side=side, shape=shape, kind=kind, method=method, tokens_per_second=rate, share_of_peak=share,
        peak_memory=memory, step=statistics.median(each for each, _ in records), steps=len(records), **more,
    )  # fmt: skip
    return rate


def parameters_of(shape: str) -> int:
    """Return the number of weights of a shape, without memory for them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config_of(shape)).parameters())


def device_name() -> str:
    """Return the GPU's name, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def reset_peak() -> None:
    """Reset the peak of memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated() -> int:
    """Return the device memory that tensors of this process take now, in bytes."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def measure_machine(shape: str) -> None:
    """Report what the machine is and the most it can do: a copy on the device, and a product in bfloat16; small ones
    with the tiny shape.
    """
    from importlib import metadata

    versions: dict[str, str] = {}
    for name in ("torch", "transformers", "peft", "accelerate", "trl", "triton", "bitsandbytes", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    size = 8192 if torch.cuda.is_available() and shape != "tiny" else 256
    where = device()
    left, right = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    seconds = _median_of(lambda: left @ right)
    source = torch.empty(size * size * 16, device=where)
    target = torch.empty_like(source)
    copied = _median_of(lambda: target.copy_(source))
    emit(
        "machine", date=time.strftime("%Y-%m-%d", time.gmtime()), device=device_name(), versions=versions,
        python=sys.version.split()[0], numpy=np.__version__, cuda=torch.version.cuda,
        product=2 * size**3 / seconds, copy=2 * source.nbytes / copied,
    )  # fmt: skip


def _median_of(work: Any) -> float:
    times: list[float] = []
    for _ in range(8):
        synchronize()
        begun = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[3:])


def main() -> None:
    """Measure one side of one shape."""
    gc.freeze()  # as the command line does: objects of the libraries stay out of the collector's rounds
    side, shape, kinds = [*sys.argv[1:], "", ""][:3]
    if side == "machine":
        measure_machine(shape)
    elif side == "onward":
        measure_onward(shape, kinds.split(","), sys.argv[4] if len(sys.argv) > 4 else "lora")
    else:
        for kind in kinds.split(","):
            measure_peer("trl packed" if (side, kind) == ("trl", "packed") else PEERS[side], shape, kind)
            gc.collect()  # a trainer holds itself


if __name__ == "__main__":
    from onward import startup

    startup.set_environment()
    wait(*modules(*[*sys.argv[1:], ""][:2]))
    main()
