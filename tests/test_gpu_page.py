"""The page of what was seen on a GPU claims nothing that was not run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

GPU = Path(__file__).parents[1] / "bench" / "gpu"


def load(name: str) -> ModuleType:
    """Import a script of bench/gpu, which is no package."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(page: str, title: str) -> str:
    """Return the text below a heading."""
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def test_what_was_not_run_is_called_so() -> None:
    """Without a figure every section says that it was not run, and each check says why."""
    page = load("report").render([{"check": "files", "status": "not run: no GPU", "seconds": 0.0}])
    assert "Nothing was run on a GPU yet" in page
    titles = (
        "Exactness", "Speed", "Against peers in the same run", "Ways to compute a layer",
        "Memory at the peak of a step", "Beside the steps",
    )  # fmt: skip
    assert ["Not run."] * 6 == [section(page, title).strip() for title in titles]
    assert "| files | not run: no GPU |" in section(page, "Every check")


def test_bits_that_differ_stand_out() -> None:
    """An exactness check that failed is in bold; one that held says `==`, also if the run ended soon afterwards."""
    records = [{"subject": "SIGKILL", "instant": f"change {n}", "equal": n == 1} for n in (1, 2)]
    page = load("report").render(records)
    assert "Nothing was run" not in page
    lines = section(page, "Exactness").strip().splitlines()[2:]
    assert ["| SIGKILL | change 1 | == | - |", "| SIGKILL | change 2 | **differs** | - |"] == lines


def test_an_exactness_check_that_did_not_end_is_not_passed_over() -> None:
    """It has a line like one whose bits differ, and `make gpu` fails; one that was not begun is only called so."""
    report = load("report")
    records = [
        {"check": "files", "status": "failed: out of memory", "seconds": 1.0, "exact": True},
        {"check": "kills", "status": "not run: no time left", "seconds": 0.0, "exact": True},
        {"check": "machine", "status": "failed: out of memory", "seconds": 1.0},
        *({"subject": "twice", "method": method, "equal": method == "lora"} for method in ("lora", "full")),
    ]
    lines = section(report.render(records), "Exactness").strip().splitlines()[2:]
    assert "| files | - | **not seen** | failed: out of memory |" == lines[-1]
    assert 3 == len(lines)
    assert ["twice", "files"] == report.not_equal(records)


def test_remarks_belong_to_the_figures_that_they_are_about() -> None:
    """A new page has its day and none of the remarks on an earlier one; they are added when somebody asks for it."""
    report = load("report")
    figures = {"device": "H200", "versions": {}, "python": "3.12", "cuda": "13.0", "product": 7e14, "copy": 4e12}
    records = [{"subject": "machine", "date": "2026-12-01", **figures}]
    assert "2026-12-01: H200, CUDA 13.0" in report.render(records)
    assert "## Remarks" not in report.render(records)
    assert report.render(records, remarks="## Remarks\n\nOf one day.\n").endswith("\n\n## Remarks\n\nOf one day.\n")


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    """What a process was writing when it was ended costs one figure, not the page."""
    record, path = load("record"), tmp_path / "results.jsonl"
    record.append(path, {"subject": "machine", "device": "x"})
    with path.open("a") as stream:
        stream.write('{"subject": "spe')
    assert [{"subject": "machine", "device": "x"}] == record.read(path)


def test_ways_to_compute_a_layer_are_held_against_each_other() -> None:
    """Each way says its speed and whether two processes had the same bits; one that failed says why."""
    taken = {"tokens_per_second": 5e4, "start": 2.0, "peak": 3e9}
    records = [
        {"subject": "layers", "shape": "tiny", "way": "eager", "equal": True, **taken},
        {"subject": "layers", "shape": "tiny", "way": "liger", "failed": "No module named 'liger_kernel'"},
    ]
    lines = section(load("report").render(records), "Ways to compute a layer").strip().splitlines()[2:4]
    assert "| tiny | eager | 50,000 | 3 | 2 | == |" == lines[0]
    assert "| tiny | liger | - | - | - | failed: No module named 'liger_kernel' |" == lines[1]


def test_the_steps_of_the_bench_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU with a tiny shape: what a step needs of its plan and its batch, the bench has too."""
    records = tmp_path / "results.jsonl"
    monkeypatch.syspath_prepend(GPU)
    monkeypatch.setenv("ONWARD_GPU_RECORDS", str(records))
    load("speed").measure_onward("tiny", ["packed", "mixed", "determinism"], "lora")
    found = load("record").read(records)
    assert ["speed", "speed", "determinism"] == [each["subject"] for each in found]
    assert [3, 3] == [each["steps"] for each in found[:2]]
