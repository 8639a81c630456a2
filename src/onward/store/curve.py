"""Step records across files, for drawing curves: which files have any, and single records of a range.

Every query reads a range of the table's key, so that none sorts, and none holds a snapshot of the ledger for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onward.store.database import Values
from onward.store.files import IN_STREAM
from onward.store.metrics import Ranges

SPANS = f"""
    SELECT id AS file_id, name, position,
        (SELECT step FROM steps WHERE file_id = files.id ORDER BY step LIMIT 1) AS first,
        (SELECT step FROM steps WHERE file_id = files.id ORDER BY step DESC LIMIT 1) AS last
    FROM files WHERE {IN_STREAM} AND position > ? AND first IS NOT NULL ORDER BY position
"""
COLUMNS = """
    step, step_in_file, loss, learning_rate, grad_norm, rows, tokens, target_tokens, seconds,
    (SELECT t.time FROM step_times t WHERE t.file_id = steps.file_id AND t.step = steps.step) AS time
"""
SUMS = """
    SELECT count(*) AS steps, max(step) AS last, sum(loss) AS loss, min(loss) AS loss_min,
        max(loss) AS loss_max, sum(grad_norm) AS grad_norm, min(grad_norm) AS grad_norm_min,
        max(grad_norm) AS grad_norm_max, sum(tokens) AS tokens, sum(seconds) AS seconds,
        (SELECT learning_rate FROM steps WHERE file_id = ? AND step BETWEEN ? AND ? ORDER BY step DESC LIMIT 1)
        AS learning_rate
    FROM steps WHERE file_id = ? AND step BETWEEN ? AND ?
"""


@dataclass(frozen=True)
class Span:
    """The step records that the ledger has for one file of the stream: global steps `first` to `last`."""

    file_id: int
    name: str
    position: int
    first: int
    last: int


def steps_in(spans: Sequence[Span]) -> int:
    """Return the number of steps in all spans; those of an adopted run do not begin at step 1."""
    return spans[-1].last - spans[0].first + 1 if spans else 0


class Curve(Ranges):
    """Reads step records by range."""

    def spans(self, after: int = 0) -> list[Span]:
        """Return the files of the stream after a position that have step records, in stream order."""
        return self.records(Span, SPANS, after)

    def step_values(self, file_id: int, first: int, last: int) -> list[Values]:
        """Return the records of a file between two global steps, both included, in order."""
        where = "WHERE file_id = ? AND step BETWEEN ? AND ? ORDER BY step"
        return self.query(f"SELECT {COLUMNS} FROM steps {where}", file_id, first, last)

    def step_extremes(self, file_id: int, first: int, last: int) -> list[Values]:
        """Return the records of lowest and highest loss in a range: one if they are the same, none if it is empty.

        SQLite fills the other columns from the row that holds the minimum or maximum.
        """
        where = "WHERE file_id = ? AND step BETWEEN ? AND ?"
        found: dict[int, Values] = {}
        for extreme in ("min", "max"):
            for row in self.query(
                f"SELECT {COLUMNS}, {extreme}(loss) AS extreme FROM steps {where}", file_id, first, last
            ):
                del row["extreme"]
                if row["step"] is not None:
                    found[row["step"]] = row
        return [found[step] for step in sorted(found)]

    def step_sums(self, file_id: int, first: int, last: int) -> Values:
        """Return sums and extremes over records, and the last learning rate; `steps` says how many there are."""
        return self.query(SUMS, *(file_id, first, last) * 2)[0]
