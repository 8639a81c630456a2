"""Releases side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from onward.digest import xxh3_file
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.views.releases import RECORD, Release, find_release, lines, list_releases


def told(name: str, created: float, average: float | None) -> dict[str, Any]:
    """The record of a release."""
    found = {"average": average, "forgetting": {"mean": 0.25, "worst": 0.5}, "anchor": 0.125}
    return {
        "name": name, "created": created, "step": 12, "stream": [{}, {}], "cooldown": {"steps": 5}, "averaged": [7, 9],
        "measured": found, "verified": average is not None, "notes": "n", "weights": "w",
    }  # fmt: skip


def test_releases_side_by_side(tmp_path: Path) -> None:
    """One line for each, the oldest first; what was not measured is no number, and what is no release is left out."""
    layout = RunLayout(tmp_path)
    assert ["no releases yet; onward release NAME makes one"] == list(lines(list_releases(layout)))
    with pytest.raises(UsageError) as refused:
        find_release(layout, "v1")
    assert "Releases: none." == refused.value.hint
    records: dict[str, Any] = {
        "v1": told("v1", 2.0, 1.5), "first": told("first", 1.0, None), "renamed": told("v9", 3.0, 1.0),
        "list": [1], "torn": None,
    }  # fmt: skip
    for name, record in records.items():
        (layout.releases / name).mkdir(parents=True)
        (layout.releases / name / RECORD).write_text("{" if record is None else json.dumps(record))
    found = list_releases(layout)
    assert [
        "name   step  files  cooldown  average loss  forgetting   worst  KL to base         proof",
        "first    12      2         5             -      0.2500  0.5000      0.1250  not verified",
        "v1       12      2         5        1.5000      0.2500  0.5000      0.1250      verified",
    ] == list(lines(found))
    assert {
        "name": "v1", "step": 12, "files": 2, "cooldown": 5, "averaged": 2, "average": 1.5, "forgetting": 0.25,
        "worst": 0.5, "anchor": 0.125, "verified": True, "created": 2.0, "notes": "n", "weights": "w",
    } == found[1].summary()  # fmt: skip
    assert found[1] == find_release(layout, "v1")
    with pytest.raises(UsageError) as refused:
        find_release(layout, "renamed")
    assert "Releases: first, v1." == refused.value.hint
    digests = {"model": xxh3_file(found[0].folder / RECORD), "optimizer.pt": "x", "README.md": "x"}
    held = Release(tmp_path, {"files": digests})
    shutil.copy(found[0].folder / RECORD, tmp_path / "model")
    assert ["optimizer.pt"] == held.changed(tmp_path)
    assert [] == held.changed(tmp_path, ["optimizer.pt"])
