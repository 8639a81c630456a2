"""The steps of one file as its owner sees them: timed by the heartbeat, and blamed for what fails inside one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from onward.events import StepTaken
from onward.service.owner.heartbeat import Heartbeat
from onward.store.rows import StepRecord


class StepFailed(Exception):
    """A step of a file failed, whatever the reason.

    Args:
        file_id: the file in hand.
        cause: what was raised.
        crowded: whether other processes held much of the GPU's memory then.
    """

    def __init__(self, file_id: int, cause: Exception, *, crowded: bool = False) -> None:
        super().__init__(str(cause))
        self.file_id = file_id
        self.cause = cause
        self.crowded = crowded


def watched(
    steps: Iterator[StepTaken], file_id: int, heartbeat: Heartbeat, is_crowded: Callable[[], bool]
) -> Iterator[StepTaken]:
    """Yield steps; the heartbeat's limit holds while one is in hand, and only then.

    Args:
        is_crowded: asked when a step fails: whether other processes hold much of the GPU's memory.

    Raises:
        StepFailed: a step failed; it belongs to the file in hand.
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
            raise StepFailed(file_id, error, crowded=is_crowded()) from error
        finally:
            heartbeat.moved()
        seconds = result.seconds
        yield result


def record_of(file_id: int, result: StepTaken) -> StepRecord:
    """Return what the ledger keeps of a step."""
    values = asdict(result)
    del values["steps_in_file"]
    values["replayed"] = len(result.replayed)
    return StepRecord(file_id, **values)


def log_entry(result: StepTaken) -> dict[str, Any]:
    """Return what `trainer_state.json` says of a step."""
    return {
        "step": result.step,
        "epoch": result.epoch,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
    }
