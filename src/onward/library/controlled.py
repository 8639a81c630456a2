"""A run whose training process can be asked for something."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from onward.library.making import open_ledger
from onward.library.observed import Observed
from onward.service import client
from onward.service.moment import require_same_moment
from onward.store.ledger import Ledger


class Controlled(Observed):
    """A run whose owner may be another process, or another thread of this one; requests go to it, and it answers.

    Each request returns the answer, in words. `patience` is how many seconds to wait for it: the request stays open
    after that. In the thread that trains, as in an observer, a request returns at once and is answered after the step.

    Raises:
        NoSpace: the disk is too full to record a request.
        OnwardError: the process that owns the run shows no sign of life.
    """

    def pause(self, *, release: bool = False, patience: float = 60.0) -> str:
        """Ask the process that trains to pause after its step; `release` frees the model's memory.

        Without such a process the pause is noted, and the next `watch` begins paused.
        """
        with open_ledger(self.layout) as ledger:
            return client.pause(self.layout, ledger, patience, release=release)

    def resume(self, *, patience: float = 60.0) -> str:
        """Ask a paused process to resume."""
        with open_ledger(self.layout) as ledger:
            return client.resume(self.layout, ledger, patience)

    def stop(self, *, after_file: bool = False, patience: float = 600.0) -> str:
        """Ask the process that trains to commit and end, after its step or, with `after_file`, at the next boundary."""
        with open_ledger(self.layout) as ledger:
            return client.stop(self.layout, ledger, patience, after_file=after_file)

    def accept(self, file: str) -> str:
        """Queue a quarantined file (name or hash prefix) again, and let it pass the guard; return its name.

        Raises:
            UsageError: there is no such file, or its content is in the stream already.
        """
        from onward.service.state.accept import accept

        with self._ledger_to_change() as ledger:
            return accept(self.layout, ledger, file)

    @contextlib.contextmanager
    def _ledger_to_change(self) -> Generator[Ledger]:
        """Open the ledger, unless it is of another moment than the model."""
        with open_ledger(self.layout) as ledger:
            require_same_moment(self.layout, ledger)
            yield ledger
