"""The steps of one file as its owner sees them: timed by the heartbeat, and blamed for what fails inside one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from onward.events import StepTaken
from onward.service.owner.faults import StepFailed
from onward.service.owner.heartbeat import Heartbeat
from onward.store.rows import StepRecord


def watched(steps: Iterator[StepTaken], file_id: int, heartbeat: Heartbeat) -> Iterator[StepTaken]:
    """Yield steps; the heartbeat's limit holds while one is in hand, and only then.

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
            raise StepFailed(file_id, error) from error
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
