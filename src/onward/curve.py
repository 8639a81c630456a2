"""The curve of a run: its step records over all files, whole or thinned, lowest and highest loss kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from onward.store.curve import Curve, Span

COLUMNS = (
    "step", "file", "file_step", "loss", "learning_rate", "grad_norm", "rows", "tokens", "target_tokens", "seconds",
    "time",
)  # fmt: skip
"""The fields of a step record, in this order. `file` is the file's name, `file_step` the step within it, `seconds` the
wall time that the step took, `time` when it was recorded (seconds since the epoch; None for steps of earlier
releases)."""

BLOCK = 4096
"""The most steps that one query returns, so that reading everything ties up neither memory nor the ledger."""


@dataclass(frozen=True)
class Piece:
    """A range of global steps of one file, both ends included."""

    span: Span
    first: int
    last: int


def read_curve(
    ledger: Curve, every: int = 1, *, first: int | None = None, last: int | None = None
) -> Iterator[tuple[Any, ...]]:
    """Yield step records of the stream as tuples of `COLUMNS`, in order of the global step.

    Args:
        every: steps per record, on average: of every `2 * every` steps, the one with the lowest and the one with the
            highest loss are kept. Their curve is no flatter than that of all records (Steinarsson 2013, "Downsampling
            Time Series for Visual Representation", calls it min-max decimation). The newest step is always among them.
        first, last: the range of global steps to read, both included; open where None.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}")
    spans = ledger.spans()
    size = BLOCK if every == 1 else 2 * every
    newest = spans[-1].last if spans else 0
    for bucket in buckets(spans, size, first=first, last=last):
        if every == 1:
            for piece in bucket:
                yield from (
                    _tuple(piece, row) for row in ledger.step_values(piece.span.file_id, piece.first, piece.last)
                )
        else:
            yield from _extremes(ledger, bucket, newest)


def as_columns(rows: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Return rows of `COLUMNS` as one list per column, the form that pandas and a chart take."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    lists = tuple(columns.values())
    for row in rows:
        for values, value in zip(lists, row, strict=True):
            values.append(value)
    return columns


def buckets(
    spans: Iterable[Span], size: int, *, first: int | None = None, last: int | None = None
) -> Iterator[list[Piece]]:
    """Yield the ranges of steps `(k * size, (k + 1) * size]` that hold records, as the pieces of files in them."""
    bucket: list[Piece] = []
    number = -1
    for span in spans:
        start, end = max(span.first, first or span.first), min(span.last, span.last if last is None else last)
        while start <= end:
            here = (start - 1) // size
            if here != number and bucket:
                yield bucket
                bucket = []
            number, stop = here, min(end, (here + 1) * size)
            bucket.append(Piece(span, start, stop))
            start = stop + 1
    if bucket:
        yield bucket


def _extremes(ledger: Curve, bucket: list[Piece], newest: int) -> Iterator[tuple[Any, ...]]:
    """Yield a bucket's records of lowest and highest loss, and the run's newest step if it is in the bucket."""
    found = [
        _tuple(piece, row)
        for piece in bucket
        for row in ledger.step_extremes(piece.span.file_id, piece.first, piece.last)
    ]
    loss = COLUMNS.index("loss")
    if not found:  # a rollback removed the steps
        return
    kept = {row[0]: row for row in (min(found, key=lambda row: row[loss]), max(found, key=lambda row: row[loss]))}
    if bucket[-1].last == newest and newest not in kept:
        piece = bucket[-1]
        kept.update((newest, _tuple(piece, row)) for row in ledger.step_values(piece.span.file_id, newest, newest))
    yield from (kept[step] for step in sorted(kept))


def _tuple(piece: Piece, row: dict[str, Any]) -> tuple[Any, ...]:
    values = {**row, "file": piece.span.name, "file_step": row["step_in_file"]}
    return tuple(values[name] for name in COLUMNS)
