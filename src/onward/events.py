"""What happens while a run trains, as plain records, and the hub that passes them to observers.

Nothing here needs torch: a progress bar, a tracker or a page can import the records quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Resumed:
    """A process continues from a committed state. `checkpoint` is its path below the run's directory."""

    step: int
    checkpoint: str
    learning_rate: float


@dataclass(frozen=True)
class FileStarted:
    """A file's first step, or its next one after a stop, is about to be taken.

    `truncated` and `dropped` count the rows that were cut or left out because they are longer than `max_length`,
    `lost_tokens` the tokens lost by that and `tokens` those left; `split` counts texts that became several rows.
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

    `rows` counts the rows of the file, `replayed` lists the additional ones of earlier files, each as (SHA-256, row);
    `tokens` and `loss` cover both. `anchor` is the KL divergence from the base if that is in the loss.
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

    `removed` lists the checkpoints that it replaced; `restore_point` is the one that was made from it at a boundary.
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
    """Something the user should read."""

    message: str


Event: TypeAlias = Resumed | FileStarted | StepTaken | Committed | FileDone | Note
Observe: TypeAlias = Callable[[Event], None]

FAILURES = 3
"""How many events in a row an observer may fail at before it is dropped."""


class Hub:
    """Passes every event to every observer; one that fails disturbs neither training nor the others.

    Args:
        observers: called with each event, in this order.
        warn: called when an observer fails for the first time, and when it is dropped.
    """

    def __init__(self, observers: Iterable[Observe], warn: Callable[[str], None]) -> None:
        self._observers: list[Observe] = list(observers)
        self._failures: dict[int, int] = {}
        self._warned: set[int] = set()
        self._warn = warn

    def tell(self, event: Event) -> None:
        """Pass an event to every observer that was not dropped."""
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
