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
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from record import emit
from shapes import LENGTH, ROWS, SHAPES, base_model, config_of, device, dtype_of, model_modules, token_rows
from turns import present, wait

WARM = 5
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
RATE = 2e-4


def lengths_of(kind: str, shape: str) -> tuple[int, int]:
    """Return the shortest and the longest length of a row."""
    most = LENGTH if shape != "tiny" else 64
    return (most, most) if kind == "packed" else (max(8, most // 40), most)


def batches(shape: str, kind: str, steps: int) -> list[list[Any]]:
    """Return the rows of each step."""
    rows = token_rows(steps * ROWS, lengths_of(kind, shape), int(config_of(shape).vocab_size))
    return [rows[step * ROWS : (step + 1) * ROWS] for step in range(steps)]


def onward_trainer(shape: str, method: str, *, fused: bool = True, **settings: Any) -> Any:
    """Return Onward's trainer of a model made in memory, as a run builds it, or without its kernels."""
    from pathlib import Path

    from onward.config import Config
    from onward.training.device_memory import read_usage
    from onward.training.execution import Execution
    from onward.training.layers.attention import lay_end_to_end
    from onward.training.layers.decoder_parts import fuse_parts, kernels_work
    from onward.training.layers.fused_lora import fuse_lora
    from onward.training.memory import USABLE, part_tokens
    from onward.training.model.adapter import add_adapter, train_in_float32
    from onward.training.model.adapter_shape import new_adapter_config
    from onward.training.state import Cursor, TrainState
    from onward.training.trainer import Trainer
    from onward.training.world import SingleProcess

    where, longest = device(), lengths_of("packed", shape)[1]
    dtype = dtype_of(where)
    values = {"max_length": longest, "learning_rate": RATE, "lora": {"rank": 16, "alpha": 32, "dropout": 0.0}}
    config = Config.model_validate({**values, "method": method, **settings})
    model = base_model(shape, torch.float32 if method == "full" else dtype)
    lay_end_to_end(model)
    if fused and kernels_work(where):
        fuse_parts(model)
    if method != "full":
        model.requires_grad_(False)
        model = add_adapter(model, new_adapter_config(config, Path(shape), model)).to(where).train()
        train_in_float32(model)
        fuse_lora(model)
    state = TrainState.start(model, config)
    state.cursor = Cursor(1, "bench", 0, 1 << 20)
    trainer = Trainer(state, config, Execution(SingleProcess(where), dtype))
    usage = read_usage(where)
    if where.type == "cuda" and usage is not None:  # as a run chooses it when it begins
        tokens = part_tokens(trainer.economy.profile, int(USABLE * usage.available), longest)
        trainer.config = config.model_copy(update={"micro_batch_tokens": tokens})
    let_record(trainer)
    return trainer


def let_record(trainer: Any) -> None:
    """Let a trainer replay parts of steps if its model allows it, as a run finds that out at its first checkpoint."""
    from onward.training.probe import Probe

    if device().type == "cuda":
        probe = Probe(trainer.state.model, 0, device(), trainer.execution.dtype)
        probe.of_model()
        trainer.economy.learned.can_record = probe.can_record


def endless_plan() -> Any:
    """Return a plan with more steps than are needed."""
    from onward.data.order import FilePlan

    return FilePlan("bench", rows=1 << 23, batch_size=ROWS, epochs=1, seed=0)


def batch_of(rows: list[Any]) -> Any:
    """Return the batch of a step."""
    from onward.data.loader import Batch
    from onward.data.order import RowReference

    return Batch(rows, [RowReference("bench", place) for place in range(len(rows))], list(range(len(rows))))


def onward_steps(trainer: Any, shape: str, kind: str, steps: int, before: int = WARM) -> Iterator[tuple[float, int]]:
    """Yield the seconds and the tokens of each step, including those before, which are not timed."""
    plan = endless_plan()
    for rows in batches(shape, kind, steps + before):
        synchronize()
        begun = time.perf_counter()
        taken = trainer.take_step(batch_of(rows), plan)
        synchronize()
        yield time.perf_counter() - begun, taken.tokens


def warm(kind: str, shape: str) -> int:
    """Return how many of Onward's steps are not timed."""
    return SETTLED if kind == "mixed" and shape in SHORT else WARM


def timed_steps(kind: str, shape: str) -> int:
    """Return how many of Onward's steps are timed."""
    return TIMED if kind == "mixed" and shape in SHORT else SHAPES[shape].steps


def synchronize() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def onward_modules(shape: str) -> list[str]:
    """Return the modules that Onward's steps need, for a process that imports before its turn."""
    kernels = ["onward.training.layers.kernels"] if present("triton") else []
    return [*model_modules(shape), "onward.training.trainer", "onward.training.model.load", *kernels]


def peer_modules(shape: str) -> list[str]:
    """Return the modules that a peer's steps need."""
    own = ["onward.training.environment", "onward.data.tokenized", "peers"]
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


def replayed(trainer: Any) -> int:
    """Return how many parts of steps were replayed so far."""
    recorded = trainer.economy.learned.recorded
    return recorded.replays if recorded else 0


def hindrance(trainer: Any) -> str:
    """Return why nothing is recorded, or nothing."""
    learned = trainer.economy.learned
    return learned.recorded.hindrance if learned.recorded else f"can record: {learned.can_record}"


def kept_by_recordings() -> int:
    """Return the bytes that recordings keep allocated on the device."""
    segments = torch.cuda.memory_snapshot() if torch.cuda.is_available() else []
    return sum(each["total_size"] for each in segments if tuple(each.get("segment_pool_id", (0, 0))) != (0, 0))


def measure_determinism(trainer: Any, shape: str) -> None:
    """Report what determinism costs: steps with and without it in turn, so that both see the same machine."""
    exact = trainer.config
    trainer.economy.record_nothing()  # only what repeats can be replayed, and that would be compared then
    seconds: dict[bool, list[float]] = {True: [], False: []}
    plan = endless_plan()
    for place, rows in enumerate(batches(shape, "packed", 2 * (SHAPES[shape].steps + WARM))):
        wanted = place % 2 == 0
        trainer.config = exact.model_copy(update={"deterministic": wanted})
        synchronize()
        begun = time.perf_counter()
        trainer.take_step(batch_of(rows), plan)
        synchronize()
        seconds[wanted].append(time.perf_counter() - begun)
    trainer.config = exact
    median = {wanted: statistics.median(times[WARM:]) for wanted, times in seconds.items()}
    cost = 1.0 - median[False] / median[True]
    emit("determinism", shape=shape, cost=cost, seconds=median[True], loose=median[False], goal=0.10, met=cost <= 0.10)


def largest_parts(trainer: Any, shape: str, kind: str) -> list[list[int]]:
    """Return the lengths of the rows of each part that was trained."""
    from onward.training.parts import parts_of

    steps = batches(shape, kind, timed_steps(kind, shape) + warm(kind, shape))
    parts = [part.batch for rows in steps for part in parts_of(batch_of(rows), trainer.config, 0, trainer.loss.layout)]
    return [[len(row.ids) for row in part.rows] for part in parts]


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


def measure_machine() -> None:
    """Report what the machine is and the most it can do: a copy on the device, and a product in bfloat16."""
    from importlib import metadata

    versions: dict[str, str] = {}
    for name in ("torch", "transformers", "peft", "accelerate", "trl", "triton", "bitsandbytes", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    size = 8192 if torch.cuda.is_available() else 256
    where = device()
    left, right = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    seconds = _median_of(lambda: left @ right)
    source = torch.empty(size * size * 16, device=where)
    target = torch.empty_like(source)
    copied = _median_of(lambda: target.copy_(source))
    emit(
        "machine", device=device_name(), versions=versions, python=sys.version.split()[0], numpy=np.__version__,
        cuda=torch.version.cuda, product=2 * size**3 / seconds, copy=2 * source.nbytes / copied,
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
        measure_machine()
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
