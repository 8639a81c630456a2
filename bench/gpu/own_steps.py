"""Onward's steps on a shape: a trainer of a model made in memory, as a run builds it, and what it does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from shapes import LENGTH, ROWS, base_model, config_of, device, dtype_of, token_rows

RATE = 2e-4
WARM = 5
"""Steps that are not timed."""


def lengths_of(kind: str, shape: str) -> tuple[int, int]:
    """Return the shortest and the longest length of a row."""
    most = LENGTH if shape != "tiny" else 64
    return (most, most) if kind == "packed" else (max(8, most // 40), most)


def batches(shape: str, kind: str, steps: int) -> list[list[Any]]:
    """Return the rows of each step."""
    rows = token_rows(steps * ROWS, lengths_of(kind, shape), int(config_of(shape).vocab_size))
    return [rows[step * ROWS : (step + 1) * ROWS] for step in range(steps)]


def onward_trainer(shape: str, method: str, *, fused: bool = True, read: Any = None, **settings: Any) -> Any:
    """Return Onward's trainer of a model made in memory, as a run builds it.

    Args:
        fused: whether it has Onward's kernels.
        read: returns the memory of the device; by default what it really has.
    """
    from pathlib import Path

    from onward.config import Config
    from onward.training.device.execution import Execution
    from onward.training.device.memory import read_usage
    from onward.training.layers.attention import lay_end_to_end
    from onward.training.layers.decoder_parts import fuse_parts, kernels_work
    from onward.training.layers.fused_lora import fuse_lora
    from onward.training.model.adapter import add_adapter, train_in_float32
    from onward.training.model.adapter_shape import new_adapter_config
    from onward.training.state import Cursor, TrainState
    from onward.training.steps.economy import Learned
    from onward.training.steps.memory import USABLE, part_tokens
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
    learned = Learned(read or read_usage)
    trainer = Trainer(state, config, Execution(SingleProcess(where), dtype), learned=learned)
    usage = learned.read(where)
    if where.type == "cuda" and usage is not None:  # as a run chooses it when it begins
        tokens = part_tokens(trainer.economy.profile, int(USABLE * usage.available), longest)
        trainer.accumulation.config = config.model_copy(update={"micro_batch_tokens": tokens})
    let_record(trainer)
    return trainer


def let_record(trainer: Any) -> None:
    """Let a trainer replay parts of steps if its model allows it, as a run finds that out at its first checkpoint."""
    from onward.training.measuring.probe import Probe

    if device().type == "cuda":
        probe = Probe(trainer.state.model, 0, device(), trainer.execution.dtype)
        probe.of_model()
        trainer.economy.learned.can_record = probe.can_record


def endless_plan() -> Any:
    """Return a plan with more steps than are needed."""
    from onward.data.plan.order import FilePlan

    return FilePlan("bench", rows=1 << 23, batch_size=ROWS, epochs=1, seed=0)


def batch_of(rows: list[Any]) -> Any:
    """Return the batch of a step."""
    from onward.data.plan.loader import Batch
    from onward.data.plan.order import RowReference

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


def synchronize() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
