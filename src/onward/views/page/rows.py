"""The rows of an accepted file as the model sees them: in order, the longest, the cut, the left out, the costliest.

They are recreated from the archived original, under the config that the file was trained with, up to a number of rows
and a time, so that viewing a file of any size neither fills the memory nor keeps a core from training.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onward.config import Config, stored_config
from onward.config.text import read_config
from onward.data.files.reading import Reading
from onward.data.plan.order import make_plan
from onward.data.row_tokenizer import Fitted
from onward.data.tokenize import check_rows
from onward.data.tokenized import PackedRow, unpack
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.service.intake.archive import require_original
from onward.service.intake.rules import run_tokenizer
from onward.store.ledger import Ledger
from onward.store.rows import FileRow, StepRecord
from onward.views.preview import ShownRow, split_text

ROWS, SECONDS = 20_000, 10.0
"""The most rows that are read, and the most time spent on it in seconds."""
OPEN = 3
"""How many files are kept open."""
COSTLY = 10
"""How many steps of highest loss have their rows shown."""
VIEWS = ("all", "longest", "cut", "dropped", "loss")


class _Enough(Exception):
    """Enough rows were read."""


@dataclass
class OpenedFile:
    """Rows of a file: `kept` has line, tokens and whether they were cut, `dropped` the lines of rows left out."""

    decode: Callable[[list[int]], str] = field(repr=False)
    kept: list[tuple[int, PackedRow, bool]] = field(default_factory=list[tuple[int, PackedRow, bool]], repr=False)
    dropped: list[int] = field(default_factory=list[int])
    is_whole: bool = True

    def see(self, line: int, fitted: Fitted) -> None:
        """Add a row."""
        if fitted.packed is None:
            self.dropped.append(line)
        else:
            self.kept.append((line, fitted.packed.copy(), fitted.truncated))

    def shown(self, index: int) -> dict[str, Any]:
        """Return a row as plain values, its text in pieces that are trained or not."""
        line, packed, cut = self.kept[index]
        row = unpack(packed)
        pieces = split_text(row.ids, row.targets, self.decode)
        shown = ShownRow(line, len(row.ids), int(np.count_nonzero(row.targets)), cut, pieces)
        return {**shown.to_dict(), "trained": shown.trained}


class RowsOfFiles:
    """Opens files of one run; the last few stay open."""

    def __init__(self, layout: RunLayout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[int, str], OpenedFile] = OrderedDict()

    def page(self, ledger: Ledger, row: FileRow, view: str, offset: int, limit: int) -> dict[str, Any]:
        """Return some rows of a file.

        Args:
            view: one of `VIEWS`.
            offset, limit: the first of them, and how many.

        Raises:
            UsageError: there is no such view.
            DamagedState: the original is gone or changed.
        """
        if view not in VIEWS:
            raise UsageError(f"there is no view {view!r}", where="view", hint=f"One of: {', '.join(VIEWS)}")
        opened = self._opened(ledger, row)
        if view == "dropped":
            found: list[dict[str, Any]] = [{"line": line} for line in opened.dropped]
            rows = found[offset : offset + limit]
        else:
            found = list(_found(ledger, row, opened, view))
            rows = [{**opened.shown(place["index"]), **place} for place in found[offset : offset + limit]]
        counts = {"cut": sum(cut for _, _, cut in opened.kept), "dropped": len(opened.dropped), "all": len(opened.kept)}
        return {"name": row.name, "rows_of_file": row.rows, "is_whole": opened.is_whole, "view": view,
                "counts": counts, "count": len(found), "offset": offset, "rows": rows}  # fmt: skip

    def _opened(self, ledger: Ledger, row: FileRow) -> OpenedFile:
        config = _config(self._layout, ledger, row)
        key = (row.id, config.model_dump_json())
        with self._lock:  # one file at a time: the cores are needed elsewhere
            if key not in self._open:
                self._open[key] = _read(self._layout, ledger, row, config)
            self._open.move_to_end(key)
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return self._open[key]


def _read(layout: RunLayout, ledger: Ledger, row: FileRow, config: Config) -> OpenedFile:
    original = require_original(layout, row)
    tokenizer = run_tokenizer(layout, ledger, config)
    backend: Any = tokenizer.state.tokenizer
    opened = OpenedFile(lambda ids: backend.decode(ids, skip_special_tokens=False))
    ends = time.monotonic() + SECONDS

    def stop() -> None:
        if len(opened.kept) >= ROWS or time.monotonic() > ends:
            raise _Enough

    reading = Reading.of_accepted(config, row.bad_rows)
    try:
        check_rows(original, tokenizer, opened.see, stop=stop, reading=reading)
    except _Enough:
        opened.is_whole = False
    return opened


def _config(layout: RunLayout, ledger: Ledger, row: FileRow) -> Config:
    """Return the config that a file was trained with, or would be trained with now."""
    return stored_config(ledger.config_of(row)) if row.config else read_config(layout.config)


def _found(ledger: Ledger, row: FileRow, opened: OpenedFile, view: str) -> Iterable[dict[str, Any]]:
    """Yield the rows that a view shows, by their index among those kept, in its order."""
    places = range(len(opened.kept))
    if view == "longest":
        places = sorted(places, key=lambda index: -len(opened.kept[index][1]))
    elif view == "cut":
        places = [index for index in places if opened.kept[index][2]]
    elif view == "loss":
        yield from _costly(ledger, row, opened)
        return
    yield from ({"index": index} for index in places)


def _costly(ledger: Ledger, row: FileRow, opened: OpenedFile) -> Iterable[dict[str, Any]]:
    """Yield the rows of the steps of highest loss, the highest first; the ledger has losses of steps, not of rows."""
    if row.config is None:
        return
    plan = make_plan(row.sha256, row.rows, stored_config(ledger.config_of(row)), row.occurrence)
    steps: list[StepRecord] = sorted(ledger.steps(row.id), key=lambda step: -step.loss)[:COSTLY]
    for step in steps:
        for reference in plan.rows_at(step.step_in_file - 1):
            if reference.row < len(opened.kept):
                yield {"index": reference.row, "step": step.step, "loss": step.loss}
