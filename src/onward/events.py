"""What happens while a run trains, as plain records, and the hub that hands them to observers.

Nothing here needs torch: a progress bar, a tracker or a page can import the records at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Resumed:
    """A process goes on from a committed state. `checkpoint` is its path below the run's directory."""

    step: int
    checkpoint: str
    learning_rate: float


@dataclass(frozen=True)
class FileStarted:
    """A file's first step, or its next one after a stop, is about to be taken.

    `truncated` and `dropped` count the rows that were cut or left out because they are longer than `max_length`,
    `lost_tokens` what went with that, of `tokens` that are left; `split` counts texts that became several rows.
    `held_out` counts the rows that are never trained.
    """

    name: str
    position: int
    rows: int
    truncated: int
    dropped: int
    steps: int
    steps_done: int
    handover: str
    max_length: int | None = None
    split: int = 0
    tokens: int = 0
    lost_tokens: int = 0
    held_out: int = 0


@dataclass(frozen=True)
class StepTaken:
    """One optimizer step. `loss` is the mean over its target tokens (nats), `seconds` its wall time.

    `rows` counts the rows of the file, `replayed` names those of earlier files on top of them, each as (SHA-256, row);
    `tokens` and `loss` are of both. `anchor` is the KL divergence to the base where it is in the loss.
    """

    step: int
    step_in_file: int
    steps_in_file: int
    epoch: int
    rows: int
    rows_digest: str
    tokens: int
    target_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    replayed: tuple[tuple[str, int], ...] = ()
    anchor: float | None = None


@dataclass(frozen=True)
class Committed:
    """A checkpoint was committed.

    `removed` names the checkpoints that it replaced, `restore_point` the one that was made of it at a boundary.
    """

    step: int
    removed: tuple[str, ...] = ()
    restore_point: str | None = None


@dataclass(frozen=True)
class FileDone:
    """A file is done and its boundary committed."""

    name: str
    position: int
    first_step: int
    last_step: int


@dataclass(frozen=True)
class Note:
    """Something a person should read."""

    message: str


Event: TypeAlias = Resumed | FileStarted | StepTaken | Committed | FileDone | Note
Observe: TypeAlias = Callable[[Event], None]

FAILURES = 3
"""Events in a row that an observer may fail at before it is dropped."""


class Hub:
    """Hands every event to every observer; one that fails disturbs neither training nor the others.

    Args:
        observers: called with each event, in this order.
        warn: called when an observer fails for the first time, and when it is dropped.
    """

    def __init__(self, observers: Iterable[Observe], warn: Callable[[str], None]) -> None:
        self._observers: list[Observe] = list(observers)
        self._failures: dict[int, int] = {}
        self._warned: set[int] = set()
        self._warn = warn

    def add(self, observe: Observe) -> None:
        """Hand events to one more observer from now on."""
        self._observers.append(observe)

    def tell(self, event: Event) -> None:
        """Hand an event to every observer that was not dropped."""
        for observe in tuple(self._observers):
            try:
                observe(event)
            except Exception as error:
                self._count_failure(observe, error)
            else:
                self._failures.pop(id(observe), None)

    def _count_failure(self, observe: Observe, error: Exception) -> None:
        count = self._failures[id(observe)] = self._failures.get(id(observe), 0) + 1
        if count == FAILURES:
            self._observers.remove(observe)
            self._warn(f"an observer failed {FAILURES} times in a row and gets no more events: {error!r}")
        elif id(observe) not in self._warned:
            self._warned.add(id(observe))
            self._warn(f"an observer failed; training goes on: {error!r}")
