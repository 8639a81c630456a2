"""Wishes: what the process that owns a run is asked for, in one queue and in order.

Signals, requests in the ledger and callers of the library all put wishes into the same queue. The owner takes them out
one after another and answers each exactly once. Long work polls the queue; signals only add to it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from onward.store.ledger import Ledger
from onward.store.rows import RequestRow
from onward.store.waiting import Waiting

AFTER_FILE = "after-file"
RELEASE = "release"
ENDED_FIRST, FAILED_FIRST = "the process ended first", "the process failed first"
"""How the answers begin to wishes that a process did not come to."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask for a stop: Ctrl-C, a service manager, a closed terminal, Slurm's notice before the time limit."""


_WAKE = signal.SIGURG
"""Interrupts the main thread when a wish comes from another one; ignored by processes that do not handle it."""

Result = TypeVar("Result")


class Stopped(Exception):
    """Work ended early because of a request; what was done is committed."""


class _Interrupted(BaseException):
    """Raised by a signal wherever the main thread is; libraries that catch every `Exception` let it through."""


@dataclass(frozen=True)
class Wish:
    """One request, whatever it came from.

    `request` is the id of the request in the ledger that waits for an answer; None for a signal or a caller of the
    library. `file` is the id of the file that a skip means; None means the current one.
    """

    kind: str
    argument: str | None = None
    file: int | None = None
    request: int | None = None

    @classmethod
    def of(cls, row: RequestRow) -> Wish:
        """Return the wish for a request in the ledger."""
        return cls(row.kind, row.argument, row.file_id, row.id)


class Wishes:
    """The open wishes, oldest first. True while one of them requires the current file to be left."""

    def __init__(self) -> None:
        self.in_hand: int | None = None
        """The id of the file that is being trained; set by the owner."""
        self.reason: str | None = None
        """Who asked for the first stop."""
        self.was_interrupted = False
        """Whether a SIGINT was among the wishes."""
        self.waiting = Waiting(should_end=lambda: self.ending)
        """How long the process waits for others that hold the ledger: not for long once it should end."""
        self.ending = False
        """Whether an end at the next step was ever asked for, answered or not."""
        self._open: deque[Wish] = deque()
        self._seen = 0
        self._listens = False
        self._ends_work: Callable[[Wish], bool] | None = None
        """Which wishes interrupt the current work of the main thread; None if nothing may interrupt it."""

    def __bool__(self) -> bool:
        return any(self._leaves_file(wish) for wish in tuple(self._open))

    @property
    def pending(self) -> bool:
        """Whether any wish is open."""
        return bool(self._open)

    @property
    def wants_end(self) -> bool:
        """Whether the process should end now."""
        return any(_is_stop(wish) for wish in tuple(self._open))

    def ask(self, reason: str) -> None:
        """Ask for a stop at the next step, as a signal or a caller of the library does; the first reason is kept."""
        self.put(Wish("stop", reason))

    def put(self, wish: Wish) -> None:
        """Add a wish. From another thread, this also interrupts interruptible work."""
        self._open.append(wish)
        if _is_stop(wish):
            self.ending = True
            self.reason = self.reason or wish.argument or "onward stop"
        self.wake()

    def wake(self) -> None:
        """Interrupt the main thread if an open wish ends its work; do nothing in the main thread itself.

        A signal that arrives just before a system call is noticed only after the call, so `poll` calls this again.
        """
        main, ends_work = threading.main_thread(), self._ends_work
        if not self._listens or ends_work is None or threading.current_thread() is main:
            return
        if any(ends_work(wish) for wish in tuple(self._open)):
            assert main.ident is not None
            signal.pthread_kill(main.ident, _WAKE)

    def ignore_up_to(self, request: int) -> None:
        """Ignore requests of the ledger up to this id: they were meant for another process."""
        self._seen = max(self._seen, request)

    def poll(self, ledger: Ledger) -> None:
        """Add new requests from the ledger; called from a background thread."""
        for row in ledger.open_requests():
            if row.id > self._seen:
                self._seen = row.id
                self.put(Wish.of(row))
        self.wake()

    def head(self) -> Wish | None:
        """Return the oldest wish, which stays in the queue."""
        return self._open[0] if self._open else None

    def take(self) -> Wish | None:
        """Take the oldest wish out of the queue."""
        return self._open.popleft() if self._open else None

    def answered_at_once(self, wish: Wish) -> bool:
        """Whether a wish can be granted between two steps, without leaving the current file."""
        return not self._leaves_file(wish)

    def check(self) -> None:
        """Raise `Stopped` if the current work should be left; for work of which nothing needs to be committed."""
        if self:
            raise Stopped(self.reason)

    def check_for_end(self) -> None:
        """Raise `Stopped` if an end was ever asked for, even if that was granted already."""
        if self.ending:
            raise Stopped(self.reason)

    def interruptibly(self, work: Callable[[], Result], *, by_any: bool) -> Result:
        """Do work that only reads (imports, loading) and return its result; a wish ends it at once.

        A function and not a context: a signal between two lines of `contextlib` would escape.

        Args:
            by_any: whether any wish ends the work, which can be repeated; otherwise only a stop does, and the process
                ends.

        Raises:
            Stopped: a wish came before or during the work.
        """
        ends_work = _is_any if by_any else _is_stop
        try:
            try:
                if threading.current_thread() is threading.main_thread():  # signals are handled there
                    self._ends_work = ends_work
                self._check_for(ends_work)
                result = work()
                self._check_for(ends_work)
                return result
            finally:
                self._ends_work = None
        except _Interrupted:
            raise Stopped(self.reason) from None
        except Exception:
            self._check_for(ends_work)  # an import cut short may fail later in some other way
            raise

    @contextlib.contextmanager
    def on_signals(self, numbers: Iterable[signal.Signals] = STOP_SIGNALS) -> Generator[None]:
        """Turn signals into wishes to stop; a second SIGINT ends at once, losing nothing that was committed.

        A SIGHUP that `nohup` made the process ignore stays ignored.
        """
        before = {number: signal.getsignal(number) for number in (*numbers, _WAKE)}
        taken = {number: old for number, old in before.items() if _may_be_taken(number, old)}
        try:
            for number in taken:
                signal.signal(number, self._handle)
            self._listens = True
            yield
        finally:
            self._listens = False
            for number, handler in taken.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.was_interrupted:
                raise KeyboardInterrupt
            self.was_interrupted = True
        if number != _WAKE:
            self.ask(signal.Signals(number).name)
        if self._ends_work is not None and any(self._ends_work(wish) for wish in tuple(self._open)):
            self._ends_work = None
            raise _Interrupted

    def _check_for(self, ends_work: Callable[[Wish], bool]) -> None:
        if any(ends_work(wish) for wish in tuple(self._open)):
            raise Stopped(self.reason)

    def _leaves_file(self, wish: Wish) -> bool:
        if wish.kind == "skip":
            return wish.file is None or wish.file == self.in_hand
        return _is_stop(wish) or wish.kind == "pause"


def _is_stop(wish: Wish) -> bool:
    return wish.kind == "stop" and wish.argument != AFTER_FILE


def _is_any(_: Wish) -> bool:
    return True


def _may_be_taken(number: signal.Signals, handler: object) -> bool:
    """Whether a signal may be handled here: a handler in C code could not be restored."""
    return handler is not None and not (number == signal.SIGHUP and handler is signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_of_host(wishes: Wishes, *, are_own: bool) -> Generator[None]:
    """Let Ctrl-C in a notebook or a script that calls the library commit first, and then interrupt as usual.

    Nothing changes if the host program handles SIGINT itself, or outside the main thread.

    Args:
        are_own: whether the library made `wishes` itself; whoever passes their own also handles signals.

    Raises:
        KeyboardInterrupt: after the body, if Ctrl-C stopped it.
    """
    is_plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not are_own or not is_plain or threading.current_thread() is not threading.main_thread():
        yield
        return
    with wishes.on_signals((signal.SIGINT,)):
        yield
    if wishes.was_interrupted:
        raise KeyboardInterrupt
