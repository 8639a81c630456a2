"""The ledger's rows as typed records: one class per table, one field per column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KEPT = (
    "command", "name", "sha256", "bytes", "format", "copy", "rows", "tokens", "target_tokens", "truncated", "dropped",
    "split", "lost_tokens", "bad_rows", "priority", "occurrence", "accepted",
)  # fmt: skip
"""Columns that a file keeps when it is queued again."""


@dataclass(frozen=True)
class FileRow:
    """One file: where it came from, what was counted in it, and its state.

    `inbox` is its path below the inbox if it came from there, `copy` its path below the run's directory. A file of the
    inbox that was seen but not read yet is announced: it has neither `copy` nor `sha256`, and `seen` identifies the
    file (device, inode, size, time). `attempts` counts the checks of its rows that began but did not end. `occurrence`
    counts the files with the same content that the stream had accepted before; the order of its rows depends on it.
    `parts` is the number of parts into which each of its steps is split after memory ran out. `truncated` and `dropped`
    count rows that were cut or left out for their length, `lost_tokens` the tokens lost by that (0 in files of earlier
    releases, which did not count them), `split` texts that became several rows, `bad_rows` rows left out because they
    cannot be trained. `held_out` counts the rows that are never trained, once the file has begun. `accepted` is 1 if a
    user told the guard to let it pass. `token_digest` is that of the tokens with which the file began; None in files of
    earlier releases.
    """

    id: int
    command: str
    name: str
    sha256: str
    bytes: int
    format: str
    copy: str
    state: str
    again: int
    priority: int
    position: int | None
    rows: int
    tokens: int
    target_tokens: int
    truncated: int
    dropped: int
    config: str | None
    start_step: int | None
    planned_steps: int | None
    arrived: float
    finished: float | None
    note: str | None
    inbox: str | None
    failures: int
    parts: int | None
    attempts: int
    occurrence: int
    seen: str | None
    split: int
    lost_tokens: int
    bad_rows: int
    held_out: int
    accepted: int
    token_digest: str | None

    @property
    def is_announced(self) -> bool:
        """Whether the file is still in the inbox, unread."""
        return not self.copy

    @property
    def first_step(self) -> int:
        """The global step after which the file began."""
        assert self.start_step is not None, self.name
        return self.start_step

    @property
    def last_step(self) -> int:
        """The global step with which the file, which has begun, is done."""
        return self.first_step + (self.planned_steps or 0)

    @property
    def place(self) -> int:
        """The position of the file, which must have one."""
        assert self.position is not None, self.name
        return self.position

    def kept(self) -> dict[str, Any]:
        """Return the columns that a file keeps when it is queued again: its identity, and the order of its rows."""
        return {column: getattr(self, column) for column in KEPT}


@dataclass(frozen=True)
class HistoryRow(FileRow):
    """A file with the totals of its step records; None if no step was trained.

    `expected` is its position, or the one that it gets if it waits and nothing is put before it; None for a file that
    was taken out of the stream.
    """

    expected: int | None
    trained: int | None
    steps: int | None
    step_from: int | None
    step_to: int | None
    seconds: float | None
    first_loss: float | None
    first_learning_rate: float | None
    last_loss: float | None
    last_learning_rate: float | None
    handover: str | None
    replayed: int | None


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of one file, as it was trained.

    `loss` is the mean over the step's target tokens, `seconds` wall time, `rows_digest` the digest of its row indices.
    `rows` counts those of the file, `replayed` the additional ones of earlier files; `tokens` and the loss cover both.
    `anchor` is the KL divergence from the base (nats per token) if it is in the loss.
    """

    file_id: int
    step: int
    step_in_file: int
    epoch: int
    rows: int
    rows_digest: str
    tokens: int
    target_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    replayed: int = 0
    anchor: float | None = None


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint: being written, committed, lost to damage, or undone (rolled back or never finished)."""

    id: int
    step: int
    file_id: int | None
    boundary: int
    state_digest: str
    basis: str
    state: str
    bytes: int
    seconds: float
    created: float


@dataclass(frozen=True)
class HandoverRow:
    """A handover: what was measured before and after, as JSON text, and its class."""

    id: int
    kind: str
    step: int
    file_id: int | None
    name: str
    before: str
    after: str
    difference: float
    created: float


@dataclass(frozen=True)
class EventRow:
    """What an operator should be able to read later; `notify.events` selects by `kind`."""

    id: int
    level: str
    message: str
    step: int | None
    created: float
    kind: str | None


@dataclass(frozen=True)
class RequestRow:
    """A request of an operator to the owner; `file_id` is the file that is meant."""

    id: int
    kind: str
    argument: str | None
    created: float
    acknowledged: float | None
    answer: str | None
    file_id: int | None


@dataclass(frozen=True)
class IntentRow:
    """A command that was given files but has not taken them in yet; `paths` is a JSON list."""

    id: int
    paths: str
    again: int
    priority: int
    created: float


@dataclass(frozen=True)
class RewindRow:
    """The run went back: steps after `step` were undone, and others may take their numbers."""

    id: int
    step: int
    created: float


@dataclass(frozen=True)
class TrackerRow:
    """How much of the run a tracker has received.

    Args:
        name: as in the config key `track`.
        run_id: its own name for the run; None before it was first reached.
        step: the last step that it received.
        shift: what is added to a step to number its point: how many points were sent but undone since.
        since: the step that the run last went back to, as far as the tracker has received it.
        rollbacks: how often steps that it had received were undone.
        rewind: the last of the ledger's rewinds that this takes into account.
        problem: why it could not be reached, or None.
        updated: when this was written, in seconds since the epoch.
    """

    name: str
    run_id: str | None
    step: int
    shift: int
    since: int
    rollbacks: int
    rewind: int
    problem: str | None
    updated: float
