"""Streams of a GPU, for tests of copies on a machine without one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Late:
    """Stands in for `torch.cuda` at its worst: a copy on the other stream is made when somebody waits for it."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], object]] = []
        self._done = 0
        self._lock = threading.Lock()

    def current_stream(self) -> Any:
        return self

    def wait_event(self, event: Any) -> None:
        event.synchronize()

    def Stream(self) -> Any:
        class Side:
            has_waited = False

            def wait_stream(self, other: Any) -> None:
                """What the other computes is done."""
                self.has_waited = True

        return Side()

    @contextmanager
    def stream(self, side: Any) -> Iterator[None]:
        late = self
        assert side.has_waited, "copied before it was computed"
        side.has_waited = False

        class Queued(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                assert torch.ops.aten.copy_.default is func
                late._queue.append(lambda: func(*args, **(kwargs or {})))
                return args[0]

        with Queued():
            yield

    def Event(self) -> Any:
        late = self

        class Event:
            def record(self, side: Any) -> None:
                self.until = len(late._queue)

            def synchronize(self) -> None:
                with late._lock:  # whoever trains and whoever writes may wait for one copy
                    while late._done < self.until:
                        late._queue[late._done]()
                        late._done += 1

        return Event()
