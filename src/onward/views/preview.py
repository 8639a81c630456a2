"""A training file as the model sees it: which tokens each row becomes, and which of them the loss covers.

The rows are checked by the very code that takes a file in, under the config of the run, so that what is shown is what
would be trained and what is refused here is what `add` refuses. Nothing is written, and no model is loaded.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onward.config import Config
from onward.config.text import read_config
from onward.data.plan.order import make_plan
from onward.data.report import IntakeReport
from onward.data.row_tokenizer import Fitted
from onward.data.tokenize import check_rows
from onward.data.tokenized import PackedRow, unpack
from onward.layout import RunLayout
from onward.service.intake.names import plain_name
from onward.service.intake.refusals import Refusal
from onward.service.intake.rules import RowRules, RulesOfRun
from onward.store.ledger import Ledger
from onward.text import printable
from onward.views.opened import opened, rejection

ROWS = 3
"""How many rows are shown by default."""
PACE = 20
"""How many steps the time estimate is averaged over."""
GUTTER = "  | "
"""Put before every line of a row, so that no row can pass for a message of Onward."""


@dataclass(frozen=True)
class Segment:
    """The text of neighbouring tokens that are either all trained or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class ShownRow:
    """One row.

    Args:
        line: its line in the file, or its row in formats without lines; for a piece, that of the original row.
        tokens: how many it has.
        trained: how many of them the loss covers.
        cut: whether its end was cut off at `max_length`.
        segments: its text; joined, they are its decoded tokens, including special tokens.
    """

    line: int
    tokens: int
    trained: int
    cut: bool
    segments: list[Segment]

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values, as `--json` prints it."""
        segments = [{"text": segment.text, "trained": segment.trained} for segment in self.segments]
        return {"line": self.line, "tokens": self.tokens, "cut": self.cut, "segments": segments}


@dataclass(frozen=True)
class Preview:
    """The content of a file, as far as requested.

    Args:
        name: the file's name.
        report: what checking all of its rows found.
        max_length: tokens that a row may have.
        held_out: rows that would be held out of training; `report` counts them too.
        steps: optimizer steps that training it takes.
        seconds: how long those take, about, at the pace of the newest steps; None if the run has none.
        kept: line, tokens and whether they were cut, for each row to be shown.
        decode: returns the text of token ids.
    """

    name: str
    report: IntakeReport
    max_length: int
    held_out: int
    steps: int
    seconds: float | None
    kept: list[tuple[int, PackedRow, bool]] = field(repr=False)
    decode: Callable[[list[int]], str] = field(repr=False)

    @property
    def left_out(self) -> list[str]:
        """The bad rows that are left out under `bad_rows: drop`, as lines of text."""
        return Refusal.of_rows(self.name, self.report).lines() if self.report.bad_rows else []

    def rows(self) -> Iterator[ShownRow]:
        """Yield the requested rows, in the order of the file, or longest first."""
        for line, packed, cut in self.kept:
            row = unpack(packed)
            segments = split_text(row.ids, row.targets, self.decode)
            yield ShownRow(line, len(row.ids), int(np.count_nonzero(row.targets)), cut, segments)


class _Kept:
    """The rows to be shown: the first ones, or the longest.

    Args:
        count: the most rows to keep; None for all.
        worst: whether to keep the longest rows, with cut ones before all others.
    """

    def __init__(self, count: int | None, *, worst: bool) -> None:
        self._count = count
        self._worst = worst
        self._rows: list[tuple[bool, int, int, int, PackedRow]] = []
        self._seen = 0

    def __call__(self, line: int, fitted: Fitted) -> None:
        if fitted.packed is None:
            return
        self._seen += 1
        if self._count is None or len(self._rows) < self._count:
            entry = self._entry(line, fitted, fitted.packed)
            heapq.heappush(self._rows, entry) if self._worst else self._rows.append(entry)
        elif self._worst and self._rank(fitted, fitted.packed) > self._rows[0][:2]:
            heapq.heapreplace(self._rows, self._entry(line, fitted, fitted.packed))

    def rows(self) -> list[tuple[int, PackedRow, bool]]:
        """Return line, tokens and whether they were cut: of the first rows in order, or of the longest ones first."""
        rows = sorted(self._rows, key=lambda row: row[:3], reverse=True) if self._worst else self._rows
        return [(line, packed, cut) for cut, _, _, line, packed in rows]

    def _entry(self, line: int, fitted: Fitted, packed: PackedRow) -> tuple[bool, int, int, int, PackedRow]:
        return (*self._rank(fitted, packed), -self._seen, line, packed.copy())  # a view would keep its whole chunk

    @staticmethod
    def _rank(fitted: Fitted, packed: PackedRow) -> tuple[bool, int]:
        return fitted.truncated, len(packed)


def preview(layout: RunLayout, path: Path, count: int | None, *, worst: bool) -> Preview:
    """Read a file as `add` would under the run's config, and keep its first or longest rows for showing.

    The whole file is checked, in memory that does not grow with it. Rows that the length policy leaves out are counted
    in the report but not shown.

    Args:
        path: a file, a saved data set, or the name of one on the Hub.
        count: rows to show, as they would be trained; None for all.
        worst: whether to show the longest rows, cut ones first, instead of the first ones.

    Raises:
        FileRejected: `add` would refuse the file.
        UsageError: there is no run, no such file, or more than one.
        ConfigError, ModelError: the config, or the tokenizer of the run, cannot be used.
    """
    layout.require()
    config = read_config(layout.config)
    kept = _Kept(count, worst=worst)
    with Ledger(layout.ledger, read_only=True) as ledger:
        rules = RulesOfRun(layout, ledger, lambda: config)()
        name, report = _checked(path, rules, kept)
        plan = make_plan("", report.rows, config)
        seconds = _seconds(ledger, report.tokens * plan.trained_rows / report.rows, config)
    backend: Any = rules.tokenizer.state.tokenizer

    def decode(ids: list[int]) -> str:
        return backend.decode(ids, skip_special_tokens=False)

    return Preview(name, report, config.max_length, len(plan.held_out), plan.steps, seconds, kept.rows(), decode)


def _checked(path: Path, rules: RowRules, observe: Callable[[int, Fitted], None]) -> tuple[str, IntakeReport]:
    """Check all rows of the file that a path means; return its name and what was found.

    Raises:
        FileRejected: it would be refused.
    """
    with opened(path) as file:
        name = plain_name(file.name)
        report = check_rows(file, rules.tokenizer, observe, reading=rules.reading)
    if not report.ok:
        raise rejection(Refusal.of_rows(name, report))
    return name, report


def split_text(ids: NDArray[np.int64], targets: NDArray[np.bool_], decode: Callable[[list[int]], str]) -> list[Segment]:
    """Return the text of a row in pieces that are trained or not; joined, they are `decode` of all ids.

    A character whose bytes are in tokens of both kinds belongs to the piece in which it ends.

    Args:
        ids: token ids, shape (T,).
        targets: which of them the loss covers, bool, shape (T,).
        decode: returns the text of token ids.
    """
    every = ids.tolist()
    text = decode(every)
    changes = (np.flatnonzero(targets[1:] != targets[:-1]) + 1).tolist()
    kinds = [bool(targets[first]) for first in (0, *changes)]
    texts = [decode(every[start:end]) for start, end in pairwise((0, *changes, len(every)))]
    if "".join(texts) != text:  # a character is split, or a token decodes differently at the beginning of a text
        texts = _cut(text, [decode(every[:change]) for change in changes])
    pieces: list[Segment] = []
    for piece, trained in zip(texts, kinds, strict=True):
        if piece and pieces and pieces[-1].trained == trained:
            pieces.append(Segment(pieces.pop().text + piece, trained))
        elif piece:
            pieces.append(Segment(piece, trained))
    return pieces


def lines_of(row: ShownRow, unit: str, mark: Callable[[str], str]) -> list[str]:
    """Return a row as lines of text, printable whatever the row contains.

    Args:
        unit: the unit of the row's line, "line" or "row".
        mark: marks printable lines as trained text.
    """
    cut = ", cut" if row.cut else ""
    head = f"{unit} {row.line}: {row.tokens} tokens, {row.trained} trained{cut}"
    shown = [(_printable(segment.text), segment.trained) for segment in row.segments]
    body = "".join(mark(text) if trained else text for text, trained in shown)
    return [head, *(f"{GUTTER}{line}" if line else GUTTER.rstrip() for line in body.split("\n"))]


def _printable(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _cut(text: str, beginnings: Sequence[str]) -> list[str]:
    """Return a text cut after what it shares with each of its beginnings, whose ends may be split characters."""
    places = [0]
    for beginning in beginnings:
        places.append(max(places[-1], _common(beginning, text)))
    return [text[start:end] for start, end in pairwise((*places, len(text)))]


def _common(first: str, second: str) -> int:
    """Return how many leading characters two texts have in common."""
    places = range(min(len(first), len(second)))
    return next((place for place in places if first[place] != second[place]), len(places))


def _seconds(ledger: Ledger, tokens: float, config: Config) -> float | None:
    """Return how long an epoch's tokens of a file take in all epochs, with the rows that are replayed in them."""
    last = ledger.at_position(ledger.last_begun())
    steps = ledger.last_steps(last.id, PACE) if last is not None else []
    taken, seconds = sum(step.tokens for step in steps), sum(step.seconds for step in steps)
    return tokens * (1 + config.replay.share) * config.epochs * seconds / taken if taken else None
