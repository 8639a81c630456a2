"""The figures under the grid, on tables made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ledgers import made_up_run

from onward.service.knowledge.table import Column, Table, read_newest, read_table
from onward.store.ledger import Ledger
from onward.views.grid import ON_PAPER, grid_csv, grid_lines, grid_svg


def score(loss: float, rows: tuple[int, ...] = (1, 2), *, trained: bool = False) -> dict[str, Any]:
    """What was measured of one file."""
    return {"loss": loss, "accuracy": loss / 10, "tokens": 5, "rows": list(rows), "trained": trained}


A, B, C = (Column(key, place, f"{key}.jsonl") for place, key in enumerate("abc", start=1))
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


def test_other_rows_are_not_compared() -> None:
    """A loss on other rows of a file says nothing about forgetting; nothing measured, nothing is invented."""
    rows = [{}, {"a": score(2.0, (1,))}, {"a": score(9.0, (1, 2)), "b": score(1.0)}]
    table = Table([A, B], [0, 1, 2], rows, [None] * 3)
    assert {1: 0.0} == table.forgotten()
    assert table.backward is None
    assert table.transfer is None
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
    assert "average loss now   1000.0000" == lines[16]
    assert (ON_PAPER + 2) * (ON_PAPER + 1) == grid_svg(grid).count("<rect") - 1
    assert (1002, 1003) == (len(grid_csv(grid).splitlines()), grid_csv(grid).splitlines()[1].count(",") + 1)


def test_the_corner_of_the_newest_files_is_that_of_the_whole_table(tmp_path: Path) -> None:
    """For a screen only the newest files are read: they are shown as in the whole table."""
    layout = made_up_run(tmp_path / "run", [(f"{name}.jsonl", 1) for name in "abcde"], float)
    with Ledger(layout.ledger) as ledger:
        for file_id, name in enumerate("abcde", start=1):
            ledger.set_file(file_id, sha256=name)
            seen = "abcde"[max(0, file_id - 3) : file_id]
            asked = {"q": score(9.0 - file_id)}
            grid = {
                "model": {key: score(float(file_id), trained=key == "e") for key in seen} | asked,
                "base": {name: score(7.0)}, "anchor": None, "names": {"q": "q.jsonl"}, "cost": 1,
            }  # fmt: skip
            before = {"model": {name: score(6.0)}, "base": {}, "anchor": None, "names": {}, "cost": 1}
            ledger.keep_boundary_results(file_id, file_id, {"grid": grid, "before": before})
        whole, newest = read_table(ledger).to_dict(), read_newest(ledger, 2)
        everything = read_newest(ledger, 9)
    assert {name: whole[name] for name in ("files", "after", "loss")} | {"earlier": 0} == everything
    assert (3, [0, 4, 5]) == (newest["earlier"], newest["after"])
    assert [whole["files"][place] for place in (3, 4, 5)] == newest["files"]
    assert [[row[place] for place in (3, 4, 5)] for row in whole["loss"][-2:]] == newest["loss"][1:]
    assert [7.0, 7.0, None] == newest["loss"][0]
    assert [False, True, False] == [file["trained"] for file in newest["files"]]
