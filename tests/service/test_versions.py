"""What doctor says of the libraries that are installed."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

from onward.layout import MANIFEST, RunLayout
from onward.service.proof.doctor.versions import (
    COMPUTING,
    TESTED,
    check_last_versions,
    check_versions,
    out_of_range,
)
from onward.store.ledger import make_ledger

ROOT = Path(__file__).parents[2]


def test_the_tested_releases_are_those_of_the_constraints() -> None:
    """Where another release is installed, the tested one is named; it is the one that CI installs."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    assert {name: pinned[name] for name in TESTED} == TESTED
    first = next(check_versions())
    for name, tested in TESTED.items():
        is_tested = version(name).partition("+")[0] == tested
        assert f"{name} {version(name)}{'' if is_tested else f' (tested: {tested})'}" in first.message.split(", ")


def test_a_release_out_of_range_is_named_with_the_range() -> None:
    """Only what the package needs itself counts: not what extras need, nor what another system needs."""
    needed = ["pytest>=8,<9999", "pytest<8", "nowhere-at-all>=2"]
    needed += ['numpy<1; extra == "old"', 'PyYAML<1; sys_platform == "os2"']
    named = {f"pytest {version('pytest')}": "pytest<8", "nowhere-at-all is missing": "nowhere-at-all>=2"}
    assert named == out_of_range(needed)


def test_a_state_of_other_releases_is_told(tmp_path: Path) -> None:
    """Doctor names the libraries that made the newest state if they were others; a state may lack that record."""
    layout = RunLayout(tmp_path)
    make_ledger(layout.ledger)
    layout.checkpoint(0).mkdir(parents=True)
    said = []
    for environment in ({}, COMPUTING, {**COMPUTING, "transformers": "5.1.0"}):
        (layout.checkpoint(0) / MANIFEST).write_text(json.dumps({"environment": environment}))
        said += [(found.level, found.message) for found in check_last_versions(layout)]
    other = f"the newest state was made with transformers 5.1.0 (here {COMPUTING['transformers']})"
    assert [("warning", other)] == said
