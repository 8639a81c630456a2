"""The figures under the grid, on tables made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from ledgers import made_up_run
from rich.cells import cell_len

from onward.service.knowledge.table import Column, Table, read_newest, read_table
from onward.store.ledger import Ledger
from onward.views.grid import ON_PAPER, ON_SCREEN, grid_csv, grid_lines, grid_svg

DAY = "\u65e5"
"""A character as wide as two others."""
SVG = "{http://www.w3.org/2000/svg}"


def score(loss: float, rows: tuple[int, ...] = (1, 2), *, trained: bool = False) -> dict[str, Any]:
    """What was measured of one file."""
    return {"loss": loss, "accuracy": loss / 10, "tokens": 5, "rows": list(rows), "trained": trained}


A, B, C, D = (Column(key, place, f"{key}.jsonl") for place, key in enumerate("abcd", start=1))
D_BEFORE = score(9.5)
TABLE = Table(
    [A, B, C, Column("q", None, "q.jsonl")],
    [0, 1, 2, 3],
    [
        {"a": score(4.0), "b": score(5.0), "c": score(6.0)},
        {"a": score(2.0), "b": score(4.5)},
        {"a": score(1.5), "b": score(3.0), "c": score(5.0), "q": score(9.0)},
        {"a": score(2.5), "c": score(1.0, trained=True), "q": score(8.0)},
    ],
    [0.0, 0.1, None, 0.3],
)


def test_the_figures_are_those_of_their_formulas() -> None:
    """Average, forgetting, backward and forward transfer are those that docs/knowledge.md defines; blanks stay out."""
    found = TABLE.to_dict()
    assert (2.5 + 1.0) / 2 == found["average"]
    assert {"mean": 1.0, "worst": 1.0, "file": 1, "by_file": {"1": 1.0}} == found["forgetting"]
    assert 2.0 - 2.5 == found["backward_transfer"]
    assert ((4.5 - 5.0) + (5.0 - 6.0)) / 2 == found["transfer"]
    assert [[4.0, 5.0, 6.0, None], [2.0, 4.5, None, None], [1.5, 3.0, 5.0, 9.0], [2.5, None, 1.0, 8.0]] == found["loss"]
    assert 0.25 == found["accuracy"][3][0]
    assert [1, 2, 3, None] == [file["position"] for file in found["files"]]
    assert [0, 1, 2, 3] == found["after"]
    assert [0.0, 0.1, None, 0.3] == found["anchor"]
    both = replace(TABLE, scores=[*TABLE.scores[:-1], TABLE.scores[-1] | {"b": score(3.5)}])
    worst = {"mean": 0.75, "worst": 1.0, "file": 1, "by_file": {"1": 1.0, "2": 0.5}}
    assert worst == both.to_dict()["forgetting"]
    known = replace(TABLE, scores=[TABLE.scores[0] | {"a": score(1.0)}, *TABLE.scores[1:]])
    same = [(table.forgotten(), table.forgotten_share()) for table in (TABLE, known)]
    assert same[0] == same[1], "what the base knew better was not forgotten by a file after it"
    begun = replace(TABLE, columns=[*TABLE.columns, D], scores=[*TABLE.scores[:-1], TABLE.scores[-1] | {"d": D_BEFORE}])
    now = begun.to_dict()
    assert [9.5, None] == [now["loss"][3][4], now["loss"][0][4]]
    figures = ("average", "forgetting", "backward_transfer", "transfer")
    assert [found[figure] for figure in figures] == [now[figure] for figure in figures], "file 4 has only begun"


def test_other_rows_are_not_compared() -> None:
    """A loss on other rows of a file says nothing about forgetting; nothing measured, nothing is invented."""
    for other in (score(2.0, (1,)), score(2.0) | {"tokens": 4}):
        rows = [{"b": other}, {"a": other, "b": score(8.0)}, {"a": score(9.0), "b": score(1.0)}]
        table = Table([A, B], [0, 1, 2], rows, [None] * 3)
        assert {1: 0.0} == table.forgotten()
        assert {"a": 0.0, "b": 0.0} == table.forgotten_share()
        assert table.backward is None
        assert table.transfer is None
        lines = grid_lines(table.to_dict())
        assert [["base", "-", "2.0000~", "-"], ["1", "a.jsonl", "2.0000~", "8.0000", "-"]] == [
            line.split() for line in lines[1:3]
        ]
        assert lines[-1].startswith("~ measured on other rows")
    empty = Table([], [0], [{}], [None]).to_dict()
    assert (None, None, {"mean": None, "worst": None, "file": None, "by_file": {}}) == (
        empty["average"], empty["transfer"], empty["forgetting"],
    )  # fmt: skip


def test_what_was_forgotten_most() -> None:
    """Relative forgetting by content: the newest loss by the best one since the file was trained."""
    assert {"a": 2.5 / 1.5 - 1.0, "b": 0.0, "c": 0.0} == TABLE.forgotten_share()


def test_a_grid_without_a_value_says_how_to_get_some() -> None:
    """Short files pay for no measuring: a table of blanks would tell nothing."""
    grid = TABLE.to_dict()
    blank = {"loss": [[None] * len(row) for row in grid["loss"]], "anchor": [None] * len(grid["anchor"])}
    (line,) = grid_lines({**grid, **blank})
    assert "onward evaluate measures everything now" in line
    assert ["nothing has been measured, because nothing has been trained yet; onward train FILE"] == (
        grid_lines(Table([], [0], [{}], [None]).to_dict())
    )


def test_the_grid_as_text_csv_and_picture() -> None:
    """What was not measured is blank in each; rows that were trained are marked; names are shown as text."""
    grid = TABLE.to_dict()
    grid["files"][0]["name"] = "<a>\x1b[31m&.jsonl"
    lines = grid_lines(grid)
    assert (["loss", "after"], "c.jsonl*", "anchor") == (
        lines[0].split()[:2],
        lines[0].split()[7],
        lines[0].split()[-1],
    )
    assert ["3", "c.jsonl", "2.5000", "-", "1.0000", "8.0000", "0.3000"] == lines[4].split()
    assert "forgetting         1.0000 mean, worst 1.0000 (file 1, " in "\n".join(lines)
    assert "\x1b" not in "\n".join(lines)
    table = grid_csv(grid).splitlines()
    assert ["3", "2.5", "", "1.0", "8.0", "0.3"] == table[4].split(",")
    picture = grid_svg(grid)
    assert (True, False, False) == ("&lt;a&gt;" in picture, "<a>" in picture, "\x1b" in picture)
    assert 4 * 5 == picture.count("<rect") - 1


def test_the_table_is_aligned_with_its_figures_under_it() -> None:
    """Names to the left, numbers to the right, whatever width the characters of a name have."""
    grid = TABLE.to_dict()
    assert [
        "loss after  1 a.jsonl  2 b.jsonl  3 c.jsonl*  q.jsonl  anchor",
        "base           4.0000     5.0000      6.0000        -  0.0000",
        "1 a.jsonl      2.0000     4.5000           -        -  0.1000",
        "2 b.jsonl      1.5000     3.0000      5.0000   9.0000       -",
        "3 c.jsonl      2.5000          -      1.0000   8.0000  0.3000",
        "",
        "average loss now   1.7500 (of 2 of 3 files)",
        "forgetting         1.0000 mean, worst 1.0000 (file 1, a.jsonl)",
        "transfer           -0.7500 (loss on a file before it was trained, minus the base's)",
        "* measured on rows that were trained: retention, not generalization",
    ] == grid_lines(grid)
    for file in grid["files"]:
        file["trained"] = False
    grid["files"][0]["name"], grid["files"][1]["name"] = DAY * 8, f"{DAY * 8}x"
    lines = grid_lines({**grid, "forgetting": {"mean": None, "worst": None, "file": None}})
    assert 1 == len({cell_len(line) for line in lines[:5]})
    assert f"1 {DAY * 8}  2 {DAY * 7} \u2026" in lines[0]
    assert ["", "forgetting         - mean"] == [lines[5], lines[7]]
    assert "transfer" in lines[-1]
    assert grid_csv(TABLE.to_dict()).startswith(
        "after,1 a.jsonl,2 b.jsonl,3 c.jsonl,q.jsonl,anchor\n0,4.0,5.0,6.0,,0.0\n"
    )


def test_the_picture_has_each_cell_in_its_place_and_colour() -> None:
    """In a column the lowest loss is lightest, the highest darkest, and text is of the other kind; nothing overlaps,
    and nothing is outside.
    """
    grid = TABLE.to_dict()
    grid["loss"][3][3] = grid["loss"][2][3]  # a column of equal losses
    drawn = ElementTree.fromstring(grid_svg(grid))
    width, height = (int(drawn.attrib[name]) for name in ("width", "height"))
    assert f"0 0 {width} {height}" == drawn.attrib["viewBox"]
    sheet, *cells = drawn.iter(f"{SVG}rect")
    assert (width, height) == (int(sheet.attrib["width"]), int(sheet.attrib["height"]))
    boxes = [tuple(int(cell.attrib[name]) for name in ("x", "y", "width", "height")) for cell in cells]
    xs, ys = sorted({box[0] for box in boxes}), sorted({box[1] for box in boxes})
    assert [(x, y) for y in ys for x in xs] == [box[:2] for box in boxes]
    assert all(after - x > wide > 0 for (x, _, wide, _), after in zip(boxes, (*xs[1:], width), strict=False))
    assert all(after - y > high > 0 for y, after in pairwise((*ys, height)) for high in {box[3] for box in boxes})
    texts = [text for text in drawn.iter(f"{SVG}text") if text.attrib.get("text-anchor") == "middle"]
    places = {(int(text.attrib["x"]), int(text.attrib["y"])): text for text in texts}
    values = [value for row, anchor in zip(grid["loss"], grid["anchor"], strict=True) for value in (*row, anchor)]
    shown: dict[int, list[tuple[float, int]]] = {}
    for value, cell, (x, y, wide, high) in zip(values, cells, boxes, strict=True):
        inside = [text for (left, low), text in places.items() if left == x + wide // 2 and y < low < y + high]
        assert ([] if value is None else [f"{value:.4f}"]) == [text.text for text in inside]
        if value is None:
            assert "none" == cell.attrib["fill"]
            continue
        colour = cell.attrib["fill"]
        light = sum(int(colour[at : at + 2], 16) for at in (1, 3, 5))
        shown.setdefault(x, []).append((value, light))
        assert "#ffffff" == inside[0].attrib["fill"] or light > 3 * 128
    lightest, darkest = sum(bytes.fromhex("ecf3fa")), sum(bytes.fromhex("0c3e7a"))
    for column in shown.values():
        lights = [light for _, light in sorted(column)]
        assert sorted(lights, reverse=True) == lights
        assert [lightest, darkest if column[0][0] != column[-1][0] else lightest] == [lights[0], lights[-1]]
    assert "#bfcfe0" == cells[5].attrib["fill"]  # 2.0 between 1.5 and 4.0


def test_what_cannot_be_compared_has_no_colour_in_the_picture() -> None:
    """A loss on other rows is marked; the others are coloured as they are without it, and marks are explained."""
    scores = [dict(row) for row in TABLE.scores]
    scores[0]["a"] = score(90.0, rows=(7,))
    grid, without = (
        replace(TABLE, scores=rows).to_dict()
        for rows in (
            scores,
            [{key: row[key] for key in row if key != "a"} if not at else row for at, row in enumerate(scores)],
        )
    )
    drawn, other = (ElementTree.fromstring(grid_svg(each)) for each in (grid, without))
    cells, left = (list(each.iter(f"{SVG}rect"))[1:] for each in (drawn, other))
    assert [cell.attrib for cell in left] == [cell.attrib for cell in cells]
    assert "none" == cells[0].attrib["fill"]
    assert ["90.0000~"] == [text.text for text in drawn.iter(f"{SVG}text") if "~" in str(text.text)][1:]
    words = [[text.text for text in each.iter(f"{SVG}text") if text.attrib.get("x") == "16"] for each in (drawn, other)]
    assert ["darker: higher loss", "* on trained rows"] == words[1]
    assert [*words[1], "~ on other rows"] == words[0]


def test_names_in_the_picture_stand_at_their_rows_and_columns() -> None:
    """Each over its column or beside its row."""
    drawn = ElementTree.fromstring(grid_svg(TABLE.to_dict()))
    _, *cells = drawn.iter(f"{SVG}rect")
    heads = {text.text: text.attrib["transform"] for text in drawn.iter(f"{SVG}text") if "transform" in text.attrib}
    for name, cell in zip(("1 a.jsonl", "2 b.jsonl", "3 c.jsonl*", "q.jsonl", "anchor"), cells, strict=False):
        x, y = (int(number) for number in re.findall(r"\d+", heads[name])[:2])
        assert int(cell.attrib["x"]) < x < int(cell.attrib["x"]) + int(cell.attrib["width"])
        assert 0 < y < int(cell.attrib["y"])
    sides = [text for text in drawn.iter(f"{SVG}text") if text.attrib.get("text-anchor") == "end"]
    assert ["base", "1 a.jsonl", "2 b.jsonl", "3 c.jsonl"] == [text.text for text in sides]
    for text, cell in zip(sides, cells[::5], strict=True):
        assert 0 < int(text.attrib["x"]) < int(cell.attrib["x"])
        assert int(cell.attrib["y"]) < int(text.attrib["y"]) < int(cell.attrib["y"]) + int(cell.attrib["height"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (ON_SCREEN, None),
        (ON_SCREEN + 1, "1 earlier file is not shown; "),
        (ON_SCREEN + 2, "2 earlier files are not shown; "),
    ],
)
def test_what_is_left_out_is_counted(files: int, words: str | None) -> None:
    """One or several; nothing is said if all are there."""
    columns = [Column(str(place), place, f"{place}.jsonl") for place in range(1, files + 1)]
    rows = [{}, *({column.key: score(1.0)} for column in columns)]
    lines = grid_lines(Table(columns, list(range(files + 1)), rows, [None] * (files + 1)).to_dict())
    said = [line for line in lines if "not shown" in line]
    assert ([] if words is None else [words]) == [line[: len(words or "")] for line in said]
    assert min(files, ON_SCREEN) + 2 == lines.index("") - len(said)


def test_a_table_of_many_files_is_shown_for_the_newest() -> None:
    """It grows with the square of the files: text and picture show the newest and say so, CSV has every cell."""
    columns = [Column(str(place), place, f"{place}.jsonl") for place in range(1, 1001)]
    rows = [{}, *({column.key: score(float(column.position or 0))} for column in columns)]
    grid = Table([*columns, Column("q", None, "q.jsonl")], list(range(1001)), rows, [None] * 1001).to_dict()
    lines = grid_lines(grid)
    assert ["loss", "after", *(word for place in range(989, 1001) for word in (str(place), f"{place}.jsonl"))] == (
        lines[0].split()[:-2]
    )
    assert ["q.jsonl", "anchor"] == lines[0].split()[-2:]
    assert ["base", "989", "1000"] == [lines[at].split()[0] for at in (1, 2, 13)]
    assert "988 earlier files are not shown; onward grid --csv and --json have every file" == lines[14]
    assert "average loss now   1000.0000 (of 1 of 1000 files)" == lines[16]
    assert (ON_PAPER + 2) * (ON_PAPER + 1) == grid_svg(grid).count("<rect") - 1
    assert (1002, 1003) == (len(grid_csv(grid).splitlines()), grid_csv(grid).splitlines()[1].count(",") + 1)


def test_the_corner_of_the_newest_files_is_that_of_the_whole_table(tmp_path: Path) -> None:
    """For a screen only the newest files are read, and as many others: they are shown as in the whole table."""
    layout = made_up_run(tmp_path / "run", [(f"{name}.jsonl", 1) for name in "abcde"], float)
    with Ledger(layout.ledger) as ledger:
        for file_id, name in enumerate("abcde", start=1):
            ledger.set_file(file_id, sha256=name)
            seen = "abcde"[max(0, file_id - 3) : file_id]
            asked = {name: score(9.0 - file_id) for name in "qrs"}
            grid = {
                "model": {key: score(float(file_id), trained=key == "e") for key in seen} | asked,
                "base": {name: score(7.0)} | (dict.fromkeys("qrs", score(6.5)) if file_id == 1 else {}),
                "anchor": None, "names": {name: f"{name}.jsonl" for name in "qrs"}, "cost": 1,
            }  # fmt: skip
            before = {"model": {name: score(6.0)}, "base": {}, "anchor": None, "names": {}, "cost": 1}
            ledger.keep_boundary_results(file_id, file_id, {"grid": grid, "before": before})
        whole, newest = read_table(ledger).to_dict(), read_newest(ledger, 2)
        everything = read_newest(ledger, 9)
    assert {name: whole[name] for name in ("files", "after", "loss", "other_rows")} | {"earlier": 0} == everything
    assert (3, [0, 4, 5]) == (newest["earlier"], newest["after"])
    assert [whole["files"][place] for place in (3, 4, 5, 6)] == newest["files"]
    assert [[row[place] for place in (3, 4, 5, 6)] for row in whole["loss"][-2:]] == newest["loss"][1:]
    assert [7.0, 7.0, 6.5, 6.5] == newest["loss"][0]
    assert [False, True, False, False] == [file["trained"] for file in newest["files"]]


def test_a_narrow_terminal_gets_positions_at_the_head_of_columns_then_fewer_files() -> None:
    """The table is never wider than the terminal, where it would be wrapped; the rows have the names."""
    grid = TABLE.to_dict()
    named = grid_lines(grid)
    assert named == grid_lines(grid, 61)
    assert [
        "loss after       1       2      3*  q.jsonl  anchor",
        "base        4.0000  5.0000  6.0000        -  0.0000",
    ] == grid_lines(grid, 60)[:2]
    assert [
        "loss after      3*  q.jsonl  anchor",
        "base        6.0000        -  0.0000",
        "3 c.jsonl   1.0000   8.0000  0.3000",
        "2 earlier files are not shown; onward grid --csv and --json have every file",
    ] == grid_lines(grid, 36)[:4]
    assert named[6:] == grid_lines(grid, 36)[5:]
