"""Whether steps are recorded on a GPU: if the model allows it, and not again on a machine where it went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onward.store.ledger import Ledger
from onward.training.steps.economy import Learned

FACT = "records_nothing"
"""The ledger's fact in which a run keeps the machine on which a recording went wrong."""
MACHINE = ("processor", "driver", "cuda", "torch")
"""Entries of the environment's record that say whether another try may go better."""


class Recordings:
    """Decides whether a process records steps, and keeps what came of it.

    A recording that goes wrong may leave a process that cannot use its GPU any more. So the ledger has it before the
    next step, and the process that continues the run does not try again.

    Args:
        learned: what the process knows of its model; told whether steps may be recorded.
        environment: the environment's record.
        can_record: whether the model's computation was watched and can be recorded.
    """

    def __init__(self, ledger: Ledger, learned: Learned, environment: Mapping[str, Any], *, can_record: bool) -> None:
        self._ledger, self._learned = ledger, learned
        self._machine = {key: environment.get(key) for key in MACHINE}
        learned.can_record = can_record and ledger.get(FACT) != self._machine

    def look(self, step: int) -> None:
        """Keep it if recording has gone wrong; called after each step."""
        recorded = self._learned.recorded
        if recorded is None or not recorded.hindrance or not self._learned.can_record:
            return
        self._learned.can_record = False
        with self._ledger.transaction():
            self._ledger.put(**{FACT: self._machine})
            self._ledger.add_event("info", f"steps are no longer replayed here: {recorded.hindrance}", step)
