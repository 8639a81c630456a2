"""The table of measurements at the boundaries, file by file, and the figures derived from it; needs no torch.

Names follow Lopez-Paz and Ranzato ("Gradient Episodic Memory for Continual Learning", 2017), with losses instead of
accuracies. docs/knowledge.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from onward.store.files import BEGUN_STATES, LAST
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

GRID, BEFORE, ANSWERS = "grid", "before", "answers"
"""Names of boundary results: the measurements at the boundary after a file, those of a file before its first step, and
what was then found about its answers, for the guard."""

NOTHING: Mapping[str, Any] = {"model": {}, "base": {}, "anchor": None, "names": {}, "cost": 0}
"""What is recorded if nothing could be measured."""
Number = float | None


@dataclass(frozen=True)
class Column:
    """A file that the model is measured on.

    Args:
        key: its SHA-256.
        position: its place in the stream; None for one of `evaluation.files`.
    """

    key: str
    position: int | None
    name: str


@dataclass(frozen=True)
class Table:
    """What was measured: a row per boundary (the first is the base model), a column per file.

    Args:
        after: the position after which each row was measured; 0 for the base.
        scores: for each row, the scores by column key; what was not measured is absent.
        anchor: for each row, the KL divergence from the base on the anchor texts; None if not measured.
    """

    columns: Sequence[Column]
    after: Sequence[int]
    scores: Sequence[Mapping[str, Mapping[str, Any]]]
    anchor: Sequence[Number]

    def values(self, name: str) -> list[list[Number]]:
        """Return the matrix of `loss` or `accuracy`, indexed by row and column."""
        return [[_value(row.get(column.key), name) for column in self.columns] for row in self.scores]

    @property
    def average(self) -> Number:
        """The current mean loss, over the files of the stream that were measured after the last one."""
        return _mean(score["loss"] for _, score in self._now())

    def forgotten(self) -> dict[int, float]:
        """Return, by position, the current loss minus the best so far, for the files measured now but the last."""
        last = self.after[-1] if self.after else 0
        return {
            column.place: score["loss"] - min(seen)
            for column, score in self._now_placed()
            if column.place < last and (seen := self._seen(column, score))
        }

    def forgotten_share(self) -> dict[str, float]:
        """Return, by content, the newest loss over the best, minus 1, at least 0, for every file measured twice."""
        found: dict[str, float] = {}
        for column in self.columns:
            scores = [row[column.key] for row in self._since(column) if column.key in row]
            seen = [score["loss"] for score in scores if score["rows"] == scores[-1]["rows"]]
            if column.position is not None and seen and min(seen) > 0:
                found[column.key] = seen[-1] / min(seen) - 1.0
        return found

    @property
    def backward(self) -> Number:
        """Backward transfer: loss right after a file minus the current loss, mean over files before the last one."""
        found: list[float] = []
        for column, score in self._now_placed():
            first = self._row_of(column.place).get(column.key)
            if column.place < self.after[-1] and first is not None and first["rows"] == score["rows"]:
                found.append(first["loss"] - score["loss"])
        return _mean(found)

    @property
    def transfer(self) -> Number:
        """The loss on a file right before it was trained minus the base's, mean over the files after the first."""
        base = self.scores[0] if self.scores else {}
        found: list[float] = []
        for column in self.columns:
            before = self._row_of((column.position or 1) - 1).get(column.key) if (column.position or 0) > 1 else None
            if before is not None and column.key in base and base[column.key]["rows"] == before["rows"]:
                found.append(before["loss"] - base[column.key]["loss"])
        return _mean(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the table with its figures, as `onward grid --json` prints it."""
        forgotten = self.forgotten()
        worst = max(forgotten, key=lambda position: (forgotten[position], -position)) if forgotten else None
        return {
            "files": [self.described(column) for column in self.columns],
            "after": list(self.after),
            "loss": self.values("loss"),
            "accuracy": self.values("accuracy"),
            "anchor": list(self.anchor),
            "average": self.average,
            "forgetting": {
                "mean": _mean(forgotten.values()),
                "worst": None if worst is None else forgotten[worst],
                "file": worst,
                "by_file": {str(position): value for position, value in forgotten.items()},
            },
            "backward_transfer": self.backward,
            "transfer": self.transfer,
        }

    def described(self, column: Column) -> dict[str, Any]:
        """Return a column as `onward grid --json` prints it; its rows were trained ones if there were no others."""
        newest = next((row[column.key] for row in reversed(self.scores) if column.key in row), None)
        return {
            "position": column.position,
            "name": column.name,
            "sha256": column.key,
            "rows": None if newest is None else newest["rows"],
            "trained": None if newest is None else newest["trained"],
        }

    def _now(self) -> Iterator[tuple[Column, Mapping[str, Any]]]:
        """Return what was measured after the last file, without a file that has only begun: it is not trained yet."""
        last = self.scores[-1] if len(self.scores) > 1 else {}
        trained = (each for each in self.columns if each.position is not None and each.position <= self.after[-1])
        return ((column, last[column.key]) for column in trained if column.key in last)

    def _now_placed(self) -> Iterator[tuple[_Placed, Mapping[str, Any]]]:
        return ((_Placed(column.key, column.position or 0), score) for column, score in self._now())

    def _seen(self, column: _Placed, score: Mapping[str, Any]) -> list[float]:
        """Return the losses on a file from its own boundary on, on the same rows."""
        rows = (
            row.get(column.key) for row, after in zip(self.scores, self.after, strict=True) if after >= column.place
        )
        return [found["loss"] for found in rows if found is not None and found["rows"] == score["rows"]]

    def _since(self, column: Column) -> list[Mapping[str, Mapping[str, Any]]]:
        pairs = zip(self.scores, self.after, strict=True)
        return [row for row, after in pairs if after >= (column.position or 0)]

    def _row_of(self, position: int) -> Mapping[str, Mapping[str, Any]]:
        return next((row for row, after in zip(self.scores, self.after, strict=True) if after == position), {})


@dataclass(frozen=True)
class _Placed:
    key: str
    place: int


@dataclass(frozen=True)
class Measured:
    """What the ledger has on one file: its row, and what was measured before its first step and at its boundary."""

    row: FileRow
    grid: Mapping[str, Any] = field(default_factory=dict[str, Any])
    before: Mapping[str, Any] = field(default_factory=dict[str, Any])


def read_measured(ledger: Ledger, up_to: int = LAST, *, after: int = 0) -> list[Measured]:
    """Return what was measured for the files of the stream that have begun, in order.

    Args:
        up_to: the last position to include.
        after: the position before the first to include.
    """
    found: list[Measured] = []
    for row in ledger.in_stream(after, up_to):
        if row.state in BEGUN_STATES:
            results = ledger.boundary_results(row.id)
            found.append(Measured(row, results.get(GRID, {}), results.get(BEFORE, {})))
    return found


def table_of(measured: Sequence[Measured]) -> Table:
    """Return the table of files of the stream, with columns for the other files that were measured."""
    finished = [each for each in measured if each.grid or each.row.state == "done"]
    columns = [Column(each.row.sha256, each.row.place, each.row.name) for each in measured]
    asked = {key: name for each in measured for key, name in each.grid.get("names", {}).items()}
    columns += [Column(key, None, name) for key, name in asked.items()]
    base: dict[str, Any] = {}
    for each in reversed(measured):
        base |= {**each.grid.get("base", {}), **each.before.get("base", {})}
    rows: list[dict[str, Any]] = [base, *(dict(each.grid.get("model", {})) for each in finished)]
    after = [0, *(each.row.place for each in finished)]
    for each in measured:
        if each.before and each.row.place - 1 in after[1:]:
            row = rows[after.index(each.row.place - 1)]
            row |= {key: score for key, score in each.before["model"].items() if key not in row}
    anchors = [(each.grid.get("anchor") or {}).get("kl") for each in finished]
    of_base = 0.0 if any(value is not None for value in anchors) else None
    return Table(columns, after, rows, [of_base, *anchors])


def read_table(ledger: Ledger, up_to: int = LAST) -> Table:
    """Return the table of a run from its ledger."""
    return table_of(read_measured(ledger, up_to))


def read_newest(ledger: Ledger, count: int) -> dict[str, Any]:
    """Return the corner of the table that belongs to the newest files: as much as fits a screen.

    Returns:
        `files`, `after` and `loss` as `Table.to_dict` has them, for at most `count` files of the stream and as many of
        `evaluation.files`, and `earlier`, the number of files of the stream before them.
    """
    earlier = max(0, ledger.last_begun() - count)
    table = table_of(read_measured(ledger, after=earlier))
    placed = sum(column.position is not None for column in table.columns)
    shown = replace(table, columns=table.columns[: placed + count])
    return {
        "files": [shown.described(column) for column in shown.columns],
        "after": list(shown.after),
        "loss": shown.values("loss"),
        "earlier": earlier,
    }


def _value(score: Mapping[str, Any] | None, name: str) -> Number:
    return None if score is None else score[name]


def _mean(values: Any) -> Number:
    found = list(values)
    return fmean(found) if found else None
