"""What belongs to the whole process and is set for a while: threads share it, with a count of those that need it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator


class SharedSetting:
    """A setting of the process: the first thread in makes it, the last one out restores what was there before.

    Args:
        begin: makes the setting, and puts on the stack what restores it.
    """

    def __init__(self, begin: Callable[[contextlib.ExitStack], None]) -> None:
        self._begin = begin
        self._lock = threading.Lock()
        self._inside = 0
        self._before = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Generator[None]:
        """Keep the setting in the body; errors are still raised."""
        with self._lock:
            if self._inside == 0:
                self._begin(self._before)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._before.close()
