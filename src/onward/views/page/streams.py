"""Changes in a run as server-sent events: one look every two seconds, however many browsers are open."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from anyio import to_thread
from sse_starlette import ServerSentEvent

from onward.curve import as_columns, read_curve
from onward.errors import OnwardError
from onward.service.holder import is_held
from onward.store.curve import Span
from onward.store.ledger import PROOF, Ledger
from onward.views.page.answers import as_json
from onward.views.page.reading import RunReader

SECONDS = 2.0
"""Seconds between two looks."""
PULSE = 5.0
"""Seconds after which the state is sent again even if nothing was written: a process may have frozen."""
NEW_STEPS = 500
"""The most steps that are sent one by one; if there are more, a browser draws the curve anew."""
WAITING = 100
"""How many messages a browser may leave unread before it is disconnected; it reconnects by itself."""

FOLLOWERS = 100
"""The most browsers that follow one run at the same time."""

Message: TypeAlias = tuple[str, Any]


@dataclass
class Seen:
    """What the last look saw; each mark changes when something that is shown may have changed."""

    written: Any = None
    around: Any = None
    files: Any = None
    newest: Span | None = None


class Watcher:
    """Watches one run, and sends what it finds to all followers. Without followers, it does not look.

    Args:
        reader: reads the run.
        seconds: time between two looks.
    """

    def __init__(self, reader: RunReader, *, seconds: float = SECONDS) -> None:
        self._reader = reader
        self._seconds = seconds
        self._followers: set[asyncio.Queue[ServerSentEvent]] = set()
        self._task: asyncio.Task[None] | None = None
        self._ledger: Ledger | None = None
        self._using = threading.RLock()
        """Held while the ledger is read or closed: a look goes on in its thread when its task is cancelled."""
        self._seen = Seen()

    @property
    def is_full(self) -> bool:
        """Whether the most followers are reached."""
        return len(self._followers) >= FOLLOWERS

    async def follow(self) -> AsyncGenerator[ServerSentEvent]:
        """Yield events: first the state, then whatever changes."""
        queue: asyncio.Queue[ServerSentEvent] = asyncio.Queue(WAITING)
        self._followers.add(queue)
        try:
            yield _event(await to_thread.run_sync(self._state))
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
            while queue in self._followers or not queue.empty():
                yield await queue.get()
        finally:
            self._followers.discard(queue)

    async def end(self) -> None:
        """Stop looking, and disconnect all followers."""
        self._followers.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await to_thread.run_sync(self._close)

    async def _run(self) -> None:
        self._seen = await to_thread.run_sync(self._begin)
        while self._followers:
            for message in await to_thread.run_sync(self.look):
                self._tell(message)
            await asyncio.sleep(self._seconds)
        self._close()

    def _tell(self, message: Message) -> None:
        event = _event(message)
        for queue in tuple(self._followers):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:  # its browser sleeps
                self._followers.discard(queue)

    def _state(self) -> Message:
        try:
            return "status", self._reader.status()
        except (OnwardError, sqlite3.Error, OSError) as error:
            return "trouble", {"error": str(error)}

    def _begin(self) -> Seen:
        """Return the state when the first browser comes, which loads everything so far by itself."""
        seen = Seen()
        with self._using, contextlib.suppress(OnwardError, sqlite3.Error, OSError):
            ledger = self._opened()
            seen.newest = next(reversed(ledger.spans(ledger.last_done() - 1)), None)
            seen.files, seen.around = ledger.files_mark(), self._around(ledger)
        return seen

    def look(self) -> list[Message]:
        """Return what changed since the last look; if a run cannot be read, report that and try again later."""
        with self._using:
            try:
                return self._changes(self._opened())
            except (OnwardError, sqlite3.Error, OSError) as error:
                self._close()
                self._seen.written = None  # another connection counts anew
                return [("trouble", {"error": str(error)})]

    def _changes(self, ledger: Ledger) -> list[Message]:
        """Return what changed since the last look; if this one fails, the next one tells all of it."""
        seen = self._seen
        written = (ledger.version(), is_held(self._reader.layout.lock), time.monotonic() // PULSE)
        now = replace(seen, written=written, around=self._around(ledger))
        messages: list[Message] = []
        if now.written != seen.written:
            messages.append(self._state())
            messages += self._steps(ledger, now)
            now.files = ledger.files_mark()
        if now.files != seen.files:
            messages.append(("changed", ["history", "overview"]))  # a file whose training begins leaves the queue
        elif now.around != seen.around:
            messages.append(("changed", ["overview"]))
        self._seen = now
        return messages

    def _steps(self, ledger: Ledger, now: Seen) -> list[Message]:
        """Return the steps since the last look, or a message that steps were removed, even if others replaced them."""
        before = self._seen.newest
        spans = ledger.spans(max(0, before.position - 1) if before else 0)
        now.newest = spans[-1] if spans else None
        newest, known = spans[-1].last if spans else 0, before.last if before else 0
        goes_on = before is None or any(_goes_on(before, span) for span in spans)
        if not goes_on or newest > known + NEW_STEPS:
            return [("changed", ["curve"])]
        if newest == known:
            return []
        return [("steps", as_columns(read_curve(ledger, first=known + 1)))]

    def _around(self, ledger: Ledger) -> Any:
        layout = self._reader.layout
        folders = (layout.inbox, layout.inbox / "high", layout.inbox / "low", layout.rejected, layout.boundaries)
        times: list[int] = []
        for folder in folders:
            with contextlib.suppress(OSError):
                times.append(folder.stat().st_mtime_ns)
        return ledger.last_event(), ledger.get(PROOF), times

    def _opened(self) -> Ledger:
        """Return the ledger, opened once: only a lasting connection can tell whether others wrote to it."""
        self._reader.layout.require()
        if self._ledger is not None and self._ledger.is_snapshot:
            self._close()
        if self._ledger is not None:
            self._ledger.require_own_release()
        else:
            self._ledger = Ledger(self._reader.layout.ledger, read_only=True)
        return self._ledger

    def _close(self) -> None:
        with self._using:
            if self._ledger is not None:
                self._ledger.close()
                self._ledger = None


def _goes_on(before: Span, now: Span) -> bool:
    """Whether a file still has the steps that it had, perhaps with more behind them."""
    has_moved = (before.file_id, before.position, before.first) != (now.file_id, now.position, now.first)
    return not has_moved and now.last >= before.last


def _event(message: Message) -> ServerSentEvent:
    name, value = message
    return ServerSentEvent(data=as_json(value), event=name)
