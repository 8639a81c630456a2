"""The run's curve as a picture: loss, learning rate and gradient norm over all files, with boundaries."""

# pyright: reportMissingImports=false

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.curve import as_columns, read_curve
from onward.errors import UsageError, cannot_write
from onward.layout import RunLayout
from onward.store.curve import Span, steps_in
from onward.store.ledger import Ledger
from onward.text import how_many, printable

FORMATS = ("svg", "png", "pdf")
POINTS = 4000
"""About the most steps that are drawn: a longer curve is thinned, keeping lowest and highest losses."""
NAMED = 12
"""The most files whose names are written into the picture."""
NAME_LENGTH = 24
INCHES = (10.0, 7.0)
PANELS = (("loss", "loss"), ("learning_rate", "learning rate"), ("grad_norm", "gradient norm"))


@dataclass(frozen=True)
class Drawing:
    """What to draw: the columns of the curve, and the files with the step after which each begins."""

    columns: dict[str, list[Any]]
    boundaries: Sequence[tuple[int, str]]
    title: str


def plot(layout: RunLayout, target: Path) -> tuple[int, bool]:
    """Draw the run's curve into a file, which is replaced atomically.

    Returns:
        How many steps are drawn, and whether all characters of the names are: the font does not have every script. In
        an SVG, names stay text, for which the viewer finds fonts.

    Raises:
        UsageError: unknown kind of file, nothing to draw, a place that cannot be written to, or no matplotlib.
        NoSpace: the disk is full.
    """
    kind = target.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UsageError(
            f"the picture's name must end with one of {', '.join(FORMATS)}", where=target, hint="onward plot curve.svg"
        )
    drawing = read_drawing(layout)
    figure = _draw(drawing)
    temporary = target.with_name(f".{target.name}.part")
    try:
        is_whole = _save(figure, temporary, kind)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(error, target) from None
    return len(drawing.columns["step"]), is_whole


def read_drawing(layout: RunLayout) -> Drawing:
    """Return what to draw of a run.

    Raises:
        UsageError: it has no steps yet.
    """
    layout.require()
    with Ledger(layout.ledger, read_only=True) as ledger:
        spans = ledger.spans()
        if not spans:
            raise UsageError("the run has no steps yet", where=layout.root.absolute(), hint="onward train FILE")
        count = steps_in(spans)
        columns = as_columns(read_curve(ledger, max(1, -(-count // POINTS))))
    title = f"{printable(layout.root.absolute().name)}: {how_many(count, 'step')}, {how_many(len(spans), 'file')}"
    return Drawing(columns, [_boundary(span) for span in spans], title)


def _boundary(span: Span) -> tuple[int, str]:
    name = printable(span.name)
    return span.first - 1, name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"


def _draw(drawing: Drawing) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib", hint="pip install 'onward[plot]'") from None
    figure: Any = Figure(figsize=INCHES, layout="constrained")
    panels: Any = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=(3, 1, 1))
    steps = drawing.columns["step"]
    for panel, (key, label) in zip(panels, PANELS, strict=True):
        panel.plot(steps, drawing.columns[key], linewidth=1.0, color="#1f4e79")
        panel.set_ylabel(label)
        panel.grid(visible=True, axis="y", alpha=0.3)
        for step, _name in drawing.boundaries:
            panel.axvline(step + 0.5, color="#b0462a", linewidth=0.8, alpha=0.6)
    _name_files(panels[0], drawing)
    panels[0].set_title(_plain(drawing.title))
    panels[-1].set_xlabel("step")
    return figure


def _name_files(panel: Any, drawing: Drawing) -> None:
    """Write the names of files at their boundaries; of too many files, an even selection."""
    every = -(-len(drawing.boundaries) // NAMED)
    for step, name in drawing.boundaries[::every]:
        panel.annotate(
            _plain(name), (step + 0.5, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3),
            textcoords="offset points", rotation=90, va="top", ha="left", fontsize=7, color="#7a3320",
        )  # fmt: skip


def _plain(text: str) -> str:
    """Return a text that matplotlib does not interpret as a formula."""
    return re.sub(r"([$\\])", r"\\\1", text) if "$" in text else text


def _save(figure: Any, path: Path, kind: str) -> bool:
    """Write the picture, the same curve in the same bytes; returns whether the font has all that is written."""
    from matplotlib import rc_context

    nothing = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[kind]
    settings = {"svg.hashsalt": "onward", "svg.fonttype": "none"}
    with rc_context(settings), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, format=kind, metadata=nothing, dpi=150)
    return kind == "svg" or not any("missing from" in str(warning.message) for warning in caught)
