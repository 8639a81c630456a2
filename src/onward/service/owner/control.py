"""Control: what operators ask of the process that owns a run, through the ledger.

A command records a request and waits for its answer. The owner's `Control` sees it within `POLL_SECONDS`; the work
in hand ends at the next step, and whoever drives the work does what was asked and answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from onward.errors import OnwardError, UsageError
from onward.layout import RunLayout
from onward.service.holder import is_held
from onward.service.stop import Stopped, StopRequest
from onward.store.ledger import Ledger
from onward.store.rows import RequestRow

POLL_SECONDS = 0.2
AFTER_FILE = "after-file"
RELEASE = "release"


class Control:
    """The wishes that are open. True while one of them wants the file in hand to be left at the next step.

    Args:
        stop: set by signals, and by a request to stop.
    """

    def __init__(self, layout: RunLayout, stop: StopRequest) -> None:
        self.stop = stop
        self.wishes: dict[str, RequestRow] = {}
        self.is_paused = False
        self._layout = layout
        self._ledger: Ledger | None = None
        self._seen = 0

    def __bool__(self) -> bool:
        return bool(self.stop) or "pause" in self.wishes or "skip" in self.wishes

    def check(self) -> None:
        """Raise `Stopped` if the work in hand is to be left; nothing of it needs to be committed."""
        if self:
            raise Stopped(self.stop.reason)

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Mark what only reads: a wish to stop ends it at once, any other one waits for a step."""
        return self.stop.interruptible()

    @property
    def after_file(self) -> bool:
        """Whether the process is to end at the next boundary."""
        wish = self.wishes.get("stop")
        return wish is not None and wish.argument == AFTER_FILE

    def poll(self) -> None:
        """Look for new requests; called from a background thread, on a connection of its own."""
        if self._ledger is None:
            self._ledger = Ledger(self._layout.ledger, read_only=True)
        for request in self._ledger.open_requests():
            if request.id > self._seen:
                self._seen = request.id
                self.wishes[request.kind] = request
                if request.kind == "stop" and not self.after_file:
                    self.stop.ask("onward stop")

    def answer(self, ledger: Ledger, kind: str, answer: str) -> None:
        """Acknowledge a wish; one that came by signal has no request to answer."""
        wish = self.wishes.pop(kind, None)
        if wish is not None:
            ledger.acknowledge(wish.id, answer)

    def close(self) -> None:
        """Close the connection."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None


def expire_requests(ledger: Ledger, last: int) -> None:
    """Close what was asked of a process that is gone: requests up to the one with the id `last`."""
    for request in ledger.open_requests():
        if request.id > last:
            return
        ledger.acknowledge(request.id, "the process it was meant for had ended")


def request(
    layout: RunLayout, ledger: Ledger, kind: str, argument: str | None = None, *, patience: float,
    until: Callable[[], bool] = lambda: False,
) -> str:  # fmt: skip
    """Ask the process that owns a run for something and wait for its answer.

    Args:
        patience: seconds to wait; a step may take long, and the request stays open.
        until: what else ends the waiting.

    Returns:
        The answer, for a person to read.

    Raises:
        UsageError: no process owns the run.
        OnwardError: it ended without an answer.
    """
    if not is_held(layout.lock):
        hint = "onward watch starts one; onward status shows the run."
        raise UsageError("no process trains or watches this run", where=layout.root.absolute(), hint=hint)
    number = ledger.add_request(kind, argument)
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        row = ledger.request(number)
        if row is not None and row.acknowledged is not None:
            return str(row.answer)
        if until():
            return "it ended; what was trained is committed"
        if not is_held(layout.lock):
            ledger.acknowledge(number, "the process ended first")
            raise OnwardError("the process ended before it answered", where=layout.root, hint="onward status")
        time.sleep(POLL_SECONDS / 2)
    return f"asked; not yet acknowledged after {patience:.0f} s. onward status shows when it is"


def pause_fact(release: bool) -> dict[str, Any]:
    """What the ledger keeps of a pause: it outlasts the process."""
    return {"release": release}
