"""The curve as the page draws it: means and extremes of ranges of steps, kept from one drawing to the next."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

from onward.curve import Piece, buckets
from onward.store.curve import Curve, Span, steps_in
from onward.store.database import Values
from onward.store.metrics import RANGE

POINTS = 2000
"""A whole run is kept in at most this many ranges and at least half as many: more than a screen has columns."""
AT_ONCE = 50_000
"""How many steps are added up while a browser waits; if there are more, each range is shown by a single step until they
are added up. There are that many only in ledgers of earlier releases that were not trained since."""
COARSE = 4
"""How many times longer than requested kept ranges may be before steps are read again for a closer look."""
DRAWN = (
    "step", "loss", "loss_min", "loss_max", "learning_rate", "grad_norm", "grad_norm_min", "grad_norm_max",
    "tokens_per_second",
)  # fmt: skip
"""The columns that are drawn; `step` is the last of its range. Loss and gradient norm are means over the range."""

Bucket: TypeAlias = list[Piece]
Identity: TypeAlias = tuple[tuple[int, int, int], ...]


class KeptBuckets:
    """Sums over ranges of steps of one run. Ranges that do not change are added up once, however often they are drawn.

    Args:
        points: the most ranges that the whole run is kept in.
    """

    def __init__(self, points: int = POINTS) -> None:
        self._points = points
        self._lock = threading.Lock()
        self._kept: dict[Identity, Values] = {}

    def fill(self, ledger: Curve) -> None:
        """Add up the whole run, as far as that was not done yet."""
        with self._lock:  # once for all callers
            spans = ledger.spans()
            size = size_for(steps_in(spans), self._points)
            found = list(buckets(spans, size))
            adding = _Adding(ledger, size, self._unknown(found))
            self._kept = {_identity(bucket): self._sums(adding, bucket) for bucket in found}

    def draw(self, ledger: Curve, points: int, first: int | None, last: int | None) -> dict[str, Any]:
        """Return columns of `DRAWN` between two global steps, with about `points` ranges at most, and the files there.

        `exact` is false if ranges are shown by their last step alone until `fill` has added them up.
        """
        spans = ledger.spans()
        newest, count = _newest(spans), steps_in(spans)
        oldest = newest - count + 1
        begin, end = max(oldest, first or oldest), newest if last is None else min(last, newest)
        base, size = size_for(count, self._points), size_for(end - begin + 1, max(1, points))
        if size >= base or (COARSE * size >= base and end - begin >= AT_ONCE):
            size = base
            begin = (begin - 1) // size * size + 1
            end = newest if last is None else min(newest, -(-end // size) * size)
        found = list(buckets(spans, size, first=begin, last=end))
        unknown = self._unknown(found)
        adding = _Adding(ledger, size, unknown)
        missing = sum(map(adding.missing, unknown))
        quick = size == base and missing > AT_ONCE
        sums = [self._sums(adding, bucket, quick=quick) for bucket in found]
        rows = [_drawn(values) for values in sums if values["steps"]]
        columns = {name: [row[place] for row in rows] for place, name in enumerate(DRAWN)}
        seen = [span for span in spans if span.first <= end and span.last >= begin]
        files = [[span.name, span.position, span.first, span.last] for span in seen]
        ends = {"first": begin, "last": end, "oldest": oldest, "newest": newest}
        return {"columns": columns, "files": files, "exact": not quick, **ends}

    def _unknown(self, found: Sequence[Bucket]) -> list[Bucket]:
        return [bucket for bucket in found if _identity(bucket) not in self._kept]

    def _sums(self, adding: _Adding, bucket: Bucket, *, quick: bool = False) -> Values:
        """Return the totals of a bucket's steps or, with `quick` and if they are not kept, those of its last step."""
        known = self._kept.get(_identity(bucket))
        if known is not None:
            return known
        return adding.last(bucket) if quick else adding.sums(bucket)


class _Adding:
    """Adds up buckets of one size, from the ledger's ranges if these are no longer than the buckets."""

    def __init__(self, ledger: Curve, size: int, wanted: Sequence[Bucket]) -> None:
        self._ledger = ledger
        pieces = [(piece.span.file_id, piece.first, piece.last) for bucket in wanted for piece in bucket]
        self._ranges = ledger.step_ranges(pieces) if size >= RANGE else {}

    def missing(self, bucket: Bucket) -> int:
        """Return how many steps would have to be read one by one."""
        return sum(max(0, piece.last + 1 - self._kept(piece)[1]) for piece in bucket)

    def sums(self, bucket: Bucket) -> Values:
        """Return the totals of a bucket's steps."""
        parts: list[Values] = []
        for piece in bucket:
            kept, following = self._kept(piece)
            parts += kept
            if following <= piece.last:
                parts.append(self._ledger.step_sums(piece.span.file_id, following, piece.last))
        return _added([part for part in parts if part["steps"]])

    def last(self, bucket: Bucket) -> Values:
        """Return the last step of a bucket, as representative of all of it."""
        rows = self._ledger.step_values(bucket[-1].span.file_id, bucket[-1].last, bucket[-1].last)
        return _added([_alone(row) for row in rows])

    def _kept(self, piece: Piece) -> tuple[list[Values], int]:
        """Return the ranges that a piece begins with, and the step that follows them."""
        found: list[Values] = []
        step = piece.first
        while (known := self._ranges.get((piece.span.file_id, step))) is not None and known["last"] <= piece.last:
            found.append(known)
            step = known["last"] + 1
        return found, step


def size_for(steps: int, points: int) -> int:
    """Return the smallest power of two, as a number of steps, of which at most `points` cover so many steps."""
    size = 1
    while steps > size * points:
        size *= 2
    return size


def _newest(spans: Sequence[Span]) -> int:
    return spans[-1].last if spans else 0


def _identity(bucket: Bucket) -> Identity:
    """Return what a bucket's sums depend on: recorded steps do not change."""
    return tuple((piece.span.file_id, piece.first, piece.last) for piece in bucket)


def _alone(row: Values) -> Values:
    loss, norm = row["loss"], row["grad_norm"]
    extremes = {"loss_min": loss, "loss_max": loss, "grad_norm_min": norm, "grad_norm_max": norm}
    return {**row, **extremes, "steps": 1, "last": row["step"]}


def _added(parts: list[Values]) -> Values:
    """Return the sums of several ranges as those of one."""
    if not parts:
        return {"steps": 0}
    values = {name: sum(part[name] for part in parts) for name in ("steps", "loss", "grad_norm", "tokens", "seconds")}
    for name in ("loss", "grad_norm"):
        values[f"{name}_min"] = min(part[f"{name}_min"] for part in parts)
        values[f"{name}_max"] = max(part[f"{name}_max"] for part in parts)
    return values | {name: parts[-1][name] for name in ("last", "learning_rate")}


def _drawn(values: Values) -> tuple[Any, ...]:
    count, seconds = values["steps"], values["seconds"]
    shown = {
        **values,
        "step": values["last"],
        "loss": values["loss"] / count,
        "grad_norm": values["grad_norm"] / count,
        "tokens_per_second": values["tokens"] / seconds if seconds else None,
    }
    return tuple(_short(shown[name]) for name in DRAWN)


def _short(value: Any) -> Any:
    """Return a number with as many digits as a screen can show."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
