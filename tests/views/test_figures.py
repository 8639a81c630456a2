"""The run's steps for other programs: CSV, JSON, Parquet, columns, a picture, a notebook; and `help(Run)`."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import pydoc
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import assert_refused, onward
from documented import DOCS, blocks_for, prepare
from ledgers import made_up_run

import onward as package
from onward.layout import RunLayout
from onward.library.observed import Observed
from onward.run import Run

ROOT = Path(__file__).parents[2]
COLUMNS = [
    "step", "file", "file_step", "loss", "learning_rate", "grad_norm", "rows", "tokens", "target_tokens", "seconds",
    "time",
]  # fmt: skip
NUMBERS = {"step": int, "file": str, "file_step": int, "rows": int, "tokens": int, "target_tokens": int}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    """A run of two files with five steps, whose second file has a name that a terminal would obey."""
    return made_up_run(
        tmp_path_factory.mktemp("figures") / "run", [("a.jsonl", 3), ("b\x1b[2J.jsonl", 2)], lambda step: 1 / step
    )


def expected() -> list[dict[str, Any]]:
    """Return the steps of the run."""
    return [
        {
            "step": step, "file": "a.jsonl" if step <= 3 else "b\\x1b[2J.jsonl", "file_step": step - 3 * (step > 3),
            "loss": 1 / step, "learning_rate": 1e-4, "grad_norm": 0.5, "rows": 2, "tokens": 20, "target_tokens": 10,
            "seconds": 0.25, "time": 1000.0 + step,
        }
        for step in range(1, 6)
    ]  # fmt: skip


def test_metrics_are_the_same_in_every_form(layout: RunLayout, tmp_path: Path) -> None:
    """CSV (the default), JSON and Parquet hold the same columns and, to the last bit, the same values."""
    plain = onward("metrics", "--run", layout.root)
    assert (0, "") == (plain.status, plain.err)
    rows = list(csv.DictReader(io.StringIO(plain.out)))
    assert COLUMNS == list(rows[0])
    typed = [{key: NUMBERS.get(key, float)(value) for key, value in row.items()} for row in rows]
    assert expected() == typed
    assert plain == onward("metrics", "--csv", "--run", layout.root)
    assert expected() == onward("metrics", "--json", "--run", layout.root).json
    target = tmp_path / "steps.parquet"
    assert 0 == onward("metrics", "--parquet", "--output", target, "--run", layout.root).status
    from pyarrow.parquet import read_table

    assert expected() == read_table(target).to_pylist()


def test_parquet_goes_through_a_pipe(layout: RunLayout) -> None:
    """Without a file, the bytes are the result on standard output."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "onward", "metrics", "--parquet", "--run", layout.root],
        capture_output=True, check=True, env={"PYTHONPATH": str(Path(package.__file__).parents[1]), "PATH": "/usr/bin"},
    )  # fmt: skip
    from pyarrow import BufferReader
    from pyarrow.parquet import read_table

    assert expected() == read_table(BufferReader(done.stdout)).to_pylist()


def test_an_earlier_file_stays_where_the_ledger_cannot_be_read(layout: RunLayout, tmp_path: Path) -> None:
    """The output is begun once there is something to write."""
    root = Path(shutil.copytree(layout.root, tmp_path / "run"))
    (root / "ledger.sqlite3").write_bytes(b"no ledger" * 1000)
    earlier = tmp_path / "steps.csv"
    earlier.write_text("step\n1\n")
    assert onward("metrics", "-o", earlier, "--run", root).status > 0
    assert "step\n1\n" == earlier.read_text()


def test_metrics_can_be_thinned(layout: RunLayout) -> None:
    """`--every N` keeps about one step for N, the newest among them."""
    thinned = onward("metrics", "--every", 5, "--json", "--run", layout.root).json
    assert [1, 5] == [row["step"] for row in thinned]


def test_a_picture_of_the_grid_leaves_stdout_to_what_is_asked_for(layout: RunLayout, tmp_path: Path) -> None:
    """Alone it prints nothing there; beside JSON or CSV, that is all; without it the grid is shown."""
    picture = tmp_path / "grid.svg"
    alone, values, table = (
        onward("grid", "--svg", picture, *more, "--run", layout.root) for more in ((), ("--json",), ("--csv",))
    )
    assert [f"wrote {picture}\n"] * 3 == [outcome.err for outcome in (alone, values, table)]
    assert ("", "after") == (alone.out, next(csv.reader(io.StringIO(table.out)))[0])
    assert onward("grid", "--json", "--run", layout.root).json == values.json
    shown = onward("grid", "--run", layout.root)
    assert (True, "") == (bool(shown.out), shown.err)


def test_wrong_uses_are_refused(layout: RunLayout, tmp_path: Path) -> None:
    """Two formats at once, an interval below 1, a place that cannot be written, a directory without a run."""
    for one, other in itertools.combinations(("--csv", "--json", "--parquet"), 2):
        assert_refused(onward("metrics", one, other, "--run", layout.root), 2, "only one format can be given")
    assert_refused(onward("grid", "--csv", "--json", "--run", layout.root), 2, "only one format can be given")
    assert 2 == onward("metrics", "--every", 0, "--run", layout.root).status
    for words in (("metrics", "-o"), ("metrics", "--json", "-o"), ("metrics", "--parquet", "-o"), ("grid", "--svg")):
        assert_refused(onward(*words, tmp_path / "no" / "x", "--run", layout.root), 2, "cannot write it", "no/x")
    assert_refused(onward("metrics", "--run", tmp_path), 2, "there is no run in this directory")
    assert_refused(onward("plot", tmp_path / "x.gif", "--run", layout.root), 2, "svg, png, pdf")
    empty = made_up_run(tmp_path / "empty", [], float)
    assert "[]\n" == onward("metrics", "--json", "--run", empty.root).out
    assert ",".join(COLUMNS) + "\n" == onward("metrics", "--run", empty.root).out
    assert_refused(onward("plot", tmp_path / "x.svg", "--run", empty.root), 2, "the run has no steps yet")


def test_a_missing_extra_is_named(layout: RunLayout, tmp_path: Path) -> None:
    """Without matplotlib a picture is refused with what installs it; with it, see the next test."""
    if importlib.util.find_spec("matplotlib") is not None:
        pytest.skip("matplotlib is installed")
    outcome = onward("plot", tmp_path / "x.svg", "--run", layout.root)
    assert_refused(outcome, 2, "pip install 'onward[plot]'")
    assert [] == list(tmp_path.iterdir())


def test_a_picture_shows_the_curve_and_the_boundaries(layout: RunLayout, tmp_path: Path) -> None:
    """The picture names each file at its boundary, printable; the same run gives the same bytes; PNG works too."""
    pytest.importorskip("matplotlib", reason="pip install 'onward[plot]'")
    first, second, third = tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.png"
    for target in (first, second, third):
        assert 0 == onward("plot", target, "--run", layout.root).status
    text = first.read_text()
    assert first.read_bytes() == second.read_bytes()
    assert all(word in text for word in ("a.jsonl", "b\\x1b[2J.jsonl", "5 steps, 2 files", "learning rate"))
    assert b"\x89PNG" == third.read_bytes()[:4]
    assert ["a.svg", "b.svg", "c.png"] == sorted(path.name for path in tmp_path.iterdir())


def test_the_command_of_the_documentation_runs(
    layout: RunLayout, program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/figures.md says draws a picture does so as written."""
    pytest.importorskip("matplotlib", reason="pip install 'onward[plot]'")
    prepare(program, model, tmp_path, monkeypatch)
    (tmp_path / "made-run").symlink_to(layout.root)
    (block,) = blocks_for("test_figures", DOCS / "figures.md")
    block.run()
    assert (tmp_path / "curve.svg").is_file()


@pytest.mark.parametrize(("kind", "told"), [("svg", []), ("png", ["some names have characters that the font lacks"])])
def test_names_of_other_scripts_are_drawn_or_told(tmp_path: Path, kind: str, told: list[str]) -> None:
    """In SVG they are text; in a picture of points the command says in a line that they are not shown."""
    pytest.importorskip("matplotlib", reason="pip install 'onward[plot]'")
    layout = made_up_run(tmp_path / "run", [("\u65e5\u672c.jsonl", 3)], lambda step: 1 / step)
    outcome = onward("plot", tmp_path / f"a.{kind}", "--run", layout.root)
    assert 0 == outcome.status
    assert told == [line.partition(",")[0] for line in outcome.err.splitlines()[1:]]
    assert kind == "png" or "\u65e5\u672c.jsonl" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_columns_are_what_pandas_takes(layout: RunLayout) -> None:
    """`pandas.DataFrame(run.metrics())` has a row per step, of the types that the values have."""
    columns = Run(layout.root).metrics()
    assert COLUMNS == list(columns)
    raw = [{**row, "file": row["file"].replace("\\x1b", "\x1b")} for row in expected()]
    assert raw == [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    pandas = pytest.importorskip("pandas", reason="pandas comes with the extra `bench` of the tests")
    frame = pandas.DataFrame(columns)
    assert (5, 11) == frame.shape
    assert ["float64", "int64"] == sorted({str(frame[name].dtype) for name in COLUMNS if name != "file"})


def test_the_notebook_runs(layout: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each code cell of the notebook runs, in order; those that draw need matplotlib."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-run").symlink_to(layout.root)
    notebook = json.loads((ROOT / "docs" / "figures.ipynb").read_text())
    assert 4 == notebook["nbformat"]
    names: dict[str, Any] = {"__name__": "notebook"}
    ran = 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        assert [] == cell["outputs"]
        if "matplotlib" in source and importlib.util.find_spec("matplotlib") is None:
            continue
        exec(compile(source, "figures.ipynb", "exec"), names)
        ran += 1
    assert ran >= 4
    assert 5 == len(names["steps"])


def test_help_of_a_run_reads_well() -> None:
    """`help(Run)` gives every public method a sentence, and says what it raises where it can be refused."""
    text = pydoc.plain(pydoc.render_doc(Run))
    members = {**vars(Observed), **vars(Run)}
    public = [name for name in members if not name.startswith("_")]
    assert "metrics" in public
    for name in public:
        member = members[name]
        function = getattr(member, "__func__", getattr(member, "fget", member))
        first = (function.__doc__ or "").strip().splitlines()[0]
        assert first.endswith((".", ":", ";", "`")) or first[-1].isalpha(), name
        assert first in text, name
