"""A sample of the sweep of families (`tests/families.py`): trained and proven, or refused with what to set."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import small
import transformers

TRAINED = ("mixtral", "gemma3")
"""Experts that take an adapter; text alongside images."""


@pytest.mark.parametrize("family", TRAINED)
def test_a_family_trains_two_files_and_verifies(family: str, tmp_path: Path) -> None:
    """Two files in two openings of the run, with the default settings, and a replay of them to the last bit."""
    result = families.try_family(family, "lora", tmp_path, lora={"rank": 2})
    assert "trains" == result.outcome, result.detail


def test_the_proposal_of_a_refusal_trains(tmp_path: Path) -> None:
    """What `init` says to set for Mamba is what makes its adapter train."""
    refused = families.try_family("mamba2", "lora", tmp_path)
    assert "refused" == refused.outcome
    targets = refused.detail.partition("lora.targets=[")[2].partition("]")[0].split(", ")
    assert "trains" == families.train_family(tmp_path, "lora", lora={"targets": targets}).outcome


def test_every_family_has_its_row() -> None:
    """The page has all families of the transformers that it names, and none that must not be there."""
    rows = families.written()
    if f"transformers {transformers.__version__}," in families.PAGE.read_text(encoding="utf-8"):
        assert small.causal_families() == sorted(rows)
    assert [] == [row for row in rows.values() if "FAILED" in row]
