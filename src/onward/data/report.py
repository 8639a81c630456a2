"""The outcome of reading one training file: counts, and the rows that have a problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from onward.data.files.faults import FileError
from onward.data.files.reading import BadRows
from onward.data.row_types import KEY_LENGTH, RowError
from onward.lengths import Lengths
from onward.text import printable

PROBLEMS_SHOWN = 20
KEYS_COUNTED = 100
"""The most distinct keys that are counted: every row may have keys of its own."""
KEYS_NAMED = 12


@dataclass(frozen=True)
class Problem:
    """Why a file is refused: the line (or row) concerned, None for the whole file, and what to do about it."""

    line: int | None
    reason: str
    remedy: str


@dataclass(frozen=True)
class IntakeReport:
    """The outcome of reading one file.

    Args:
        ok: whether the file was tokenized and published.
        rows: rows that will be trained on.
        tokens: tokens in them.
        target_tokens: tokens that the loss covers.
        truncated: rows whose end was cut off at `max_length`.
        dropped: rows left out because they are too long.
        split: texts that became several rows because they are too long.
        lost_tokens: tokens that were cut off or left out for length.
        bad_rows: rows left out because they cannot be trained; `problems` names the first of them.
        longest: tokens of the longest row kept.
        problems: the first problems, at most 20.
        problem_count: how many problems there are in all.
        unit: the unit of `Problem.line`, "line" or "row".
        notes: how the file was read, where its rows do not make that plain.
        way_out: how a refused file could be trained without its bad rows; "" if it cannot.
    """

    ok: bool
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    lost_tokens: int = 0
    bad_rows: int = 0
    longest: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])
    problem_count: int = 0
    unit: str = "line"
    notes: list[str] = field(default_factory=list[str])
    way_out: str = ""

    @property
    def lengths(self) -> Lengths:
        """What became of the rows that are longer than `max_length`."""
        return Lengths(self.rows, self.truncated, self.dropped, self.split, self.tokens, self.lost_tokens)


class IgnoredKeys:
    """The keys of rows and messages that nothing read, each with the number of rows that have it."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}

    def add(self, keys: Iterable[str]) -> None:
        """Count the ignored keys of one row."""
        for key in keys:
            if key in self.count or len(self.count) < KEYS_COUNTED:
                self.count[key] = self.count.get(key, 0) + 1

    @property
    def notes(self) -> list[str]:
        """Return a note that names the first of them; no note if there are none."""
        if not self.count:
            return []
        named = [printable(key[:KEY_LENGTH]) for key in list(self.count)[:KEYS_NAMED]]
        more = len(self.count) - len(named)
        return [f"ignored keys: {', '.join(named)}{f' and {more} more' if more else ''}"]


class Problems:
    """The problems of one file: those of rows, which may be left out, and those of the file itself."""

    def __init__(self) -> None:
        self.count = 0
        self.of_file = 0
        self.first: list[Problem] = []

    def add(self, line: int | None, refusal: FileError | RowError, *, is_of_file: bool = False) -> None:
        """Record a problem."""
        self.count += 1
        self.of_file += is_of_file
        found: Iterable[Problem] = [*self.first, Problem(line, refusal.reason, refusal.remedy)]
        self.first = sorted(found, key=lambda problem: problem.line or 0)[:PROBLEMS_SHOWN]

    def may_be_left_out(self, bad_rows: BadRows, rows: int) -> bool:
        """Return whether the file, of `rows` rows, may be trained without those that have a problem."""
        return not self.of_file and (not self.count or bad_rows.may_leave_out(self.count, rows))
