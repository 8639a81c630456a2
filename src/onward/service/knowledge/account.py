"""What was trained and measured in the stream so far, accumulated so that each boundary reads only what is new.

Reading all earlier boundaries again at each one would make every file cost more than the one before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onward.service.knowledge.table import BEFORE, GRID, same_rows
from onward.store.files import BEGUN_STATES
from onward.store.ledger import Ledger
from onward.store.rows import FileRow


@dataclass(frozen=True)
class Measured:
    """A value, and after which position it was measured."""

    place: int
    value: float


@dataclass(frozen=True)
class _Score:
    """A score: after which position, and what of it tells whether another can be compared with it."""

    place: int
    score: Mapping[str, Any]


class Account:
    """The files of the stream up to a position, with what was measured of them.

    It holds what one process has read of the ledger; code that takes files back makes a new one.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._forget()

    def _forget(self) -> None:
        self._last: int | None = None
        self.position = 0
        self.tokens = 0
        """Tokens of all recorded steps."""
        self.cost = 0
        """Tokens that measuring passed through the model."""
        self.contents: dict[str, int] = {}
        """The first position of each content, in stream order."""
        self.of_base: dict[str, Mapping[str, Any]] = {}
        """What was first measured of the base, by content."""
        self.anchor: Measured | None = None
        """The newest KL divergence from the base on the anchor texts."""
        self._scores: dict[str, list[_Score]] = {}

    def up_to(self, position: int) -> Account:
        """Add up the files to a position, all of which are done, and return this account."""
        last = self._ledger.at_position(self.position)
        if position < self.position or self._last != (last and last.id):
            self._forget()
        for row in self._ledger.in_stream(self.position, position) if position > self.position else ():
            if row.state in BEGUN_STATES:
                self._add(row)
                self.position, self._last = row.place, row.id
        return self

    def newest_loss(self, key: str, now: Mapping[str, Any], since: int) -> Measured | None:
        """Return the newest loss on a content after position `since` or later, on the rows that `now` is of."""
        for known in reversed(self._scores.get(key, ())):
            if known.place < since:
                break
            if same_rows(known.score, now):
                return Measured(known.place, known.score["loss"])
        return None

    def _add(self, row: FileRow) -> None:
        results = self._ledger.boundary_results(row.id)
        before, grid = results.get(BEFORE, {}), results.get(GRID, {})
        self.tokens += self._ledger.tokens_of(row.id)
        self.cost += before.get("cost", 0) + grid.get("cost", 0)
        self.contents.setdefault(row.sha256, row.place)
        for key, score in grid.get("base", {}).items():
            self.of_base.setdefault(key, score)
        if grid.get("anchor"):
            self.anchor = Measured(row.place, grid["anchor"]["kl"])
        self._note(row.place - 1, before.get("model", {}))  # the model was still that of the previous boundary
        self._note(row.place, grid.get("model", {}))

    def _note(self, place: int, model: Mapping[str, Mapping[str, Any]]) -> None:
        for key, score in model.items():
            known = self._scores.setdefault(key, [])
            if not known or known[-1].place < place:
                known.append(_Score(place, {name: score[name] for name in ("rows", "tokens", "loss")}))
