"""What the model knows, file by file: the table as text, CSV and a heat map."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from rich.cells import cell_len, set_cell_size

from onward.text import printable

NAME_WIDTH = 16
ON_SCREEN, ON_PAPER = 12, 50
"""Files that a terminal shows, and that a heat map or a model card shows: the table grows with their square."""
TRAINED = "*"
"""Marks files that are measured on rows that were trained."""
ELSEWHERE = "~"
"""Marks losses that were measured on other rows than the newest of their column."""
CELL, HIGH, LEFT, TOP = 72, 28, 170, 96
"""Size of a cell of the heat map, and the room for names, in pixels."""
Values = Mapping[str, Any]


def part_of(grid: Values, is_shown: Callable[[int], bool]) -> dict[str, Any]:
    """Return the part of the table whose files and boundaries have certain positions.

    Files that are only measured on stay; so does the row of the base.
    """
    columns = [at for at, file in enumerate(grid["files"]) if file["position"] is None or is_shown(file["position"])]
    rows = [at for at, after in enumerate(grid["after"]) if after == 0 or is_shown(after)]
    return {
        **grid,
        "files": [grid["files"][at] for at in columns],
        "after": [grid["after"][at] for at in rows],
        **{name: [[grid[name][row][at] for at in columns] for row in rows] for name in ("loss", "accuracy")},
        "other_rows": [
            [rows.index(row), columns.index(column)]
            for row, column in grid["other_rows"]
            if row in rows and column in columns
        ],
        "anchor": [grid["anchor"][row] for row in rows],
    }


def newest_corner(grid: Values, count: int) -> tuple[Values, str]:
    """Return the part of the table that is of its newest `count` files, and words on what it leaves out."""
    placed = [file["position"] for file in grid["files"] if file["position"] is not None]
    left = placed[:-count]
    if not left:
        return grid, ""
    are = f"{len(left)} earlier files are" if len(left) > 1 else "1 earlier file is"
    words = f"{are} not shown; onward grid --csv and --json have every file"
    return part_of(grid, lambda position: position > left[-1]), words


def grid_lines(whole: Values, width: int | None = None) -> list[str]:
    """Return the table of the newest files as lines, with the figures of the whole one under it.

    Args:
        width: columns of the terminal. In a wider table, a column of a file is headed by its position alone, which the
            rows have with its name; if that is not enough, fewer files are shown.
    """
    if not whole["files"]:
        return ["nothing has been measured, because nothing has been trained yet; onward train FILE"]
    if not any(value is not None for row in (*whole["loss"], whole["anchor"]) for value in row):
        return [
            "nothing has been measured yet: evaluation.share in the config limits how much may be measured, "
            "and short files allow little; onward evaluate measures everything now"
        ]
    grid, words = newest_corner(whole, ON_SCREEN)
    lines = _table(grid, is_named=True)
    for count in range(ON_SCREEN, 0, -1):
        if width is None or max(map(cell_len, lines)) <= width:
            break
        grid, words = newest_corner(whole, count)
        lines = _table(grid, is_named=False)
    note = f"{ELSEWHERE} measured on other rows than the newest of the column: not to be compared with it"
    notes = [note] if grid["other_rows"] else []
    return [*lines, *([words] if words else []), "", *_figures(whole), *notes]


def _table(grid: Values, *, is_named: bool) -> list[str]:
    """Return a row per boundary with a column per file, aligned; columns are named, or have only the position."""
    names = [
        _title(file, NAME_WIDTH) if is_named or file["position"] is None else f"{file['position']}{_mark(file)}"
        for file in grid["files"]
    ]
    head = ["loss after", *names, "anchor"]
    body = [
        [_after(grid, place), *(_marked(grid, (place, at), loss) for at, loss in enumerate(row)), _number(anchor)]
        for place, (row, anchor) in enumerate(zip(grid["loss"], grid["anchor"], strict=True))
    ]
    widths = [max(cell_len(row[column]) for row in (head, *body)) for column in range(len(head))]
    lines = ["  ".join(_padded(cell, width, place) for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in (head, *body)]  # fmt: skip
    return [line.rstrip() for line in lines]


def _figures(grid: Values) -> list[str]:
    forgetting = grid["forgetting"]
    worst = forgetting["file"]
    names = {file["position"]: file["name"] for file in grid["files"] if file["position"] is not None}
    where = (
        f", worst {_number(forgetting['worst'])} (file {worst}, {printable(names[worst])})" if worst in names else ""
    )
    lines = [
        f"average loss now   {_number(grid['average'])}{_of_how_many(grid)}",
        f"forgetting         {_number(forgetting['mean'])} mean{where}",
        f"transfer           {_number(grid['transfer'])} (loss on a file before it was trained, minus the base's)",
    ]
    if any(file["trained"] for file in grid["files"]):
        lines.append(f"{TRAINED} measured on rows that were trained: retention, not generalization")
    return lines


def _of_how_many(grid: Values) -> str:
    """Return how many files the average is over, if it is not over all that are done."""
    now = [
        loss is not None
        for file, loss in zip(grid["files"], grid["loss"][-1], strict=True)
        if file["position"] is not None and file["position"] <= grid["after"][-1]
    ]
    return "" if all(now) or grid["average"] is None else f" (of {sum(now)} of {len(now)} files)"


def grid_csv(grid: Values) -> str:
    """Return the losses as CSV: a row per boundary, a column per file, and the anchor; blank where not measured."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["after", *(_title(file, None) for file in grid["files"]), "anchor"])
    for after, row, anchor in zip(grid["after"], grid["loss"], grid["anchor"], strict=True):
        writer.writerow([after, *("" if value is None else repr(value) for value in (*row, anchor))])
    return stream.getvalue()


def grid_svg(grid: Values) -> str:
    """Return the newest files' table as a heat map: in each column the lowest loss is lightest, the highest darkest.

    Losses on other rows than the newest of their column are marked, and have no colour.
    """
    grid, _ = newest_corner(grid, ON_PAPER)
    columns = [*(_title(file, NAME_WIDTH) for file in grid["files"]), "anchor"]
    rows = [[*row, anchor] for row, anchor in zip(grid["loss"], grid["anchor"], strict=True)]
    compared = [
        [None if [line, place] in grid["other_rows"] else value for place, value in enumerate(row)]
        for line, row in enumerate(rows)
    ]
    width, height = LEFT + CELL * len(columns) + 16, TOP + HIGH * len(rows) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" role="img">',
        "<title>Loss on each file after each file</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *(f'<text x="16" y="{24 + 16 * line}" fill="#222222">{text}</text>' for line, text in enumerate(_legend(grid))),
    ]
    for place, name in enumerate(columns):
        x = LEFT + CELL * place + CELL // 2
        parts.append(f'<text transform="translate({x},{TOP - 8}) rotate(-35)" fill="#222222">{escape(name)}</text>')
    for line, row in enumerate(rows):
        y = TOP + HIGH * line
        name = escape(_after(grid, line))
        parts.append(f'<text x="{LEFT - 8}" y="{y + 18}" text-anchor="end" fill="#222222">{name}</text>')
        parts += [
            _cell(value, compared[line][place], [each[place] for each in compared], (LEFT + CELL * place, y))
            for place, value in enumerate(row)
        ]
    return "\n".join([*parts, "</svg>", ""])


def _legend(grid: Values) -> list[str]:
    """Return what the colours and the marks of a heat map mean, in lines."""
    lines = ["darker: higher loss"]
    if any(file["trained"] for file in grid["files"]):
        lines.append(f"{TRAINED} on trained rows")
    if grid["other_rows"]:
        lines.append(f"{ELSEWHERE} on other rows")
    return lines


def _cell(value: float | None, compared: float | None, column: Sequence[float | None], at: tuple[int, int]) -> str:
    """Return one cell; what was not measured is an empty frame.

    Args:
        compared: the value again, or None if it cannot be compared with the newest of its column.
        column: the values of its column that can be.
    """
    x, y = at
    box = f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{HIGH - 2}"'
    if value is None:
        return f'{box} fill="none" stroke="#cccccc"/>'
    seen = [each for each in column if each is not None]
    dark = 0.0 if compared is None or max(seen) == min(seen) else (value - min(seen)) / (max(seen) - min(seen))
    red, green, blue = (round(light + dark * (deep - light)) for light, deep in ((236, 12), (243, 62), (250, 122)))
    fill = 'fill="none" stroke="#cccccc"' if compared is None else f'fill="#{red:02x}{green:02x}{blue:02x}"'
    ink, mark = "#ffffff" if dark > 0.5 else "#222222", ELSEWHERE * (compared is None)
    text = f'<text x="{x + CELL // 2 - 1}" y="{y + 18}" text-anchor="middle" fill="{ink}">{_number(value)}{mark}</text>'
    return f"{box} {fill}/>{text}"


def _after(grid: Values, place: int) -> str:
    after = grid["after"][place]
    if not after:
        return "base"
    name = next((file["name"] for file in grid["files"] if file["position"] == after), "")
    return f"{after} {_short(printable(name), NAME_WIDTH)}"


def _title(file: Values, width: int | None) -> str:
    position = "" if file["position"] is None else f"{file['position']} "
    name = printable(file["name"])
    return f"{position}{name}" if width is None else f"{position}{_short(name, width)}{_mark(file)}"


def _mark(file: Values) -> str:
    return TRAINED if file["trained"] else ""


def _short(text: str, width: int) -> str:
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"


def _padded(cell: str, width: int, place: int) -> str:
    room = " " * (width - cell_len(cell))
    return f"{room}{cell}" if place else f"{cell}{room}"


def _marked(grid: Values, cell: tuple[int, int], loss: float | None) -> str:
    """Return a loss, marked if it cannot be compared with the newest of its column."""
    return _number(loss) + ELSEWHERE * (list(cell) in grid["other_rows"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
