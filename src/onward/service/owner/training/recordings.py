"""Whether steps are recorded on a GPU: if the model allows it, and not again on a machine where it went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onward.events import StepTaken
from onward.service.owner.crashes import Deaths
from onward.store.ledger import Ledger
from onward.training.device.errors import tells_of_no_memory
from onward.training.steps.economy import Learned
from onward.version import __version__

FACT = "records_nothing"
"""The ledger's fact in which a run keeps the machine on which a recording went wrong."""
MACHINE = ("processor", "driver", "cuda", "torch")
"""Entries of the environment's record that say whether another try may go better."""
DEATHS = 2
"""How many processes must have died in one place of a file before the next one records nothing in that file."""


class Recordings:
    """Decides whether a process records steps and probes, and keeps what came of it.

    A recording that goes wrong may leave a process that cannot use its GPU any more. So the ledger has it before the
    next step, and the process that continues the run does not try again, unless it is another release of Onward's. A
    lack of memory may be over by then and does not count, nor does what was found before anything was recorded. A
    process that dies of a recording cannot say so; after two deaths in one place, the next process records nothing
    there.

    Args:
        environment: the environment's record.
        file_id: the file that is trained; None between two files.
    """

    def __init__(self, ledger: Ledger, environment: Mapping[str, Any], file_id: int | None) -> None:
        self._ledger, self._file_id = ledger, file_id
        self._machine = {**{key: environment.get(key) for key in MACHINE}, "onward": __version__}

    def may_be_made(self) -> bool:
        """Return whether nothing speaks against recordings, as far as the ledger knows."""
        if self._ledger.get(FACT) == self._machine:
            return False
        deaths = Deaths.of(self._ledger)
        if deaths.file != self._file_id or deaths.count < DEATHS:
            return True
        self._ledger.add_event("info", f"nothing is replayed here: {deaths.count} processes died in this place")
        return False

    def give_up(self, what: str, why: str, step: int | None, *, was_tried: bool = True) -> None:
        """Say that something cannot be replayed, and why; keep it if that may be so on this machine the next time.

        Args:
            was_tried: whether a recording of it was begun.
        """
        with self._ledger.transaction():
            if was_tried and not tells_of_no_memory(why):
                self._ledger.put(**{FACT: self._machine})
            self._ledger.add_event("info", f"{what} {'no longer' if was_tried else 'not'} replayed here: {why}", step)

    def watched(self, steps: Iterator[StepTaken], learned: Learned) -> Iterator[StepTaken]:
        """Yield steps; if recording has gone wrong in one, keep it first, also if that made the step fail."""
        step: int | None = None
        try:
            for result in steps:
                step = result.step
                self._look(learned, step)
                yield result
        except Exception:
            self._look(learned, step)
            raise

    def _look(self, learned: Learned, step: int | None) -> None:
        recorded = learned.recorded
        if recorded is not None and recorded.hindrance and learned.can_record:
            learned.can_record = False
            self.give_up("steps are", recorded.hindrance, step, was_tried=recorded.was_tried)
