"""The wish to stop, polled wherever something takes long; signals only set it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator
from types import FrameType


class Stopped(Exception):
    """Work ended early because a stop was asked for; what was done is committed."""


class StopRequest:
    """Becomes true once; `check` raises where there is nothing to commit first."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason is kept."""
        self.reason = self.reason or reason

    def check(self) -> None:
        """Raise `Stopped` if a stop was asked for."""
        if self:
            raise Stopped(self.reason)

    @contextlib.contextmanager
    def on_signals(self) -> Generator[None]:
        """Take SIGINT and SIGTERM as a wish to stop; a second SIGINT ends at once, losing nothing committed."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, _frame: FrameType | None) -> None:
            if self and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.ask(signal.Signals(number).name)

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
