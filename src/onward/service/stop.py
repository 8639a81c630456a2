"""The wish to stop, polled wherever something takes long; signals only set it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator
from types import FrameType
from typing import Protocol


class Stopped(Exception):
    """Work ended early because a stop was asked for; what was done is committed."""


class _Interrupted(BaseException):
    """Raised by a signal wherever the main thread is; libraries that outlive any `Exception` let it through."""


class Interruption(Protocol):
    """What a worker polls: true once the file in hand is to be left."""

    def __bool__(self) -> bool: ...

    def check(self) -> None:
        """Raise `Stopped` where nothing needs to be committed first."""
        ...

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Mark what only reads, so that a wish to stop may end it at once."""
        ...


class StopRequest:
    """Becomes true once; `check` raises where there is nothing to commit first."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._listens = False
        self._interruptible = False

    def __bool__(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason is kept. From another thread it ends what is interruptible, too."""
        self.reason = self.reason or reason
        if self._listens and self._interruptible and threading.current_thread() is not threading.main_thread():
            signal.raise_signal(signal.SIGTERM)  # handled in the main thread

    def check(self) -> None:
        """Raise `Stopped` if a stop was asked for."""
        if self:
            raise Stopped(self.reason)

    @contextlib.contextmanager
    def interruptible(self) -> Generator[None]:
        """Mark what only reads (imports, loading): a stop ends it at once.

        Raises:
            Stopped: a stop was asked for, before or inside.
        """
        try:
            try:
                self._interruptible = True
                self.check()
                yield
                self.check()
            finally:
                self._interruptible = False
        except _Interrupted:
            raise Stopped(self.reason) from None
        except Exception:
            self.check()  # an import that was cut short and carried on fails later, and anyhow: that is the stop
            raise

    @contextlib.contextmanager
    def on_signals(self) -> Generator[None]:
        """Take SIGINT and SIGTERM as a wish to stop; a second SIGINT ends at once, losing nothing committed."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, _frame: FrameType | None) -> None:
            if self and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.ask(signal.Signals(number).name)
            if self._interruptible:
                self._interruptible = False
                raise _Interrupted

        for number in before:
            signal.signal(number, handle)
        self._listens = True
        try:
            yield
        finally:
            self._listens = False
            for number, handler in before.items():
                signal.signal(number, handler)
