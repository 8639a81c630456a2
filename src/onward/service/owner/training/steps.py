"""The steps of one file as its owner sees them: timed by the heartbeat, and blamed for failures inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from onward.data.plan.replay import StreamPlan
from onward.events import FileStarted, StepTaken
from onward.service.owner.alongside.heartbeat import Heartbeat
from onward.store.rows import FileRow, StepRecord
from onward.training.state import Cursor


class StepFailed(Exception):
    """A step of a file failed, for whatever reason.

    Args:
        cause: what was raised.
        crowded: whether other processes then held much of the GPU's memory.
    """

    def __init__(self, cause: Exception, *, crowded: bool = False) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.crowded = crowded


def watched(steps: Iterator[StepTaken], heartbeat: Heartbeat, is_crowded: Callable[[], bool]) -> Iterator[StepTaken]:
    """Yield steps; the heartbeat's time limit holds during a step, and only then.

    Args:
        is_crowded: called if a step fails; returns whether other processes hold much of the GPU's memory.

    Raises:
        StepFailed: a step of the current file failed.
    """
    seconds: float | None = None
    while True:
        if seconds is not None:
            heartbeat.expect_step(seconds)
        try:
            result = next(steps)
        except StopIteration:
            return
        except Exception as error:
            raise StepFailed(error, crowded=is_crowded()) from error
        finally:
            heartbeat.moved()
        seconds = result.seconds
        yield result


def file_started(
    row: FileRow, cursor: Cursor, plan: StreamPlan, tokens: Mapping[str, Any], handover: str, max_length: int
) -> FileStarted:
    """Return the event of a file's first step, or of its next one after a stop.

    Args:
        tokens: what is known about its tokens, as in `TokenizedFile.meta`.
        handover: the class of its handover.
    """
    return FileStarted(
        name=row.name,
        position=cursor.position,
        rows=plan.rows,
        truncated=tokens["truncated"],
        dropped=tokens["dropped"],
        steps=plan.steps,
        steps_done=cursor.step,
        handover=handover,
        max_length=max_length,
        split=tokens.get("split", 0),  # not counted by earlier releases
        tokens=tokens["tokens"],
        lost_tokens=tokens.get("lost_tokens", 0),
        held_out=len(plan.held_out),
    )


def record_of(file_id: int, result: StepTaken) -> StepRecord:
    """Return the ledger's record of a step."""
    values = asdict(result)
    del values["steps_in_file"]
    values["replayed"] = len(result.replayed)
    return StepRecord(file_id, **values)


def log_entry(result: StepTaken, epochs: int) -> dict[str, Any]:
    """Return the entry for a step in `trainer_state.json`; a Trainer counts the epochs done, with their fraction."""
    return {
        "step": result.step,
        "epoch": result.step_in_file * epochs / result.steps_in_file,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
    }
