"""The templates that TRL ships, a sample of them (ONWARD_SOAK=1: all): our targets alongside TRL's mask."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest
from template_sweep import PAGE, ROWS, cells_of, is_marked, marked_twin, names, try_row, written
from tiny import CHATML, byte_state
from trait_templates import template_text

from onward.config import Config
from onward.data.row_types import Chat, RowError
from onward.data.templates.own_template import training_twin
from onward.service.intake.rules import RunTokenizer

EVERY = 1 if os.environ.get("ONWARD_SOAK") else 6
SAMPLE = names()[::EVERY]


def test_the_page_says_what_is_so() -> None:
    """The page has a line for every template; `python tests/template_sweep.py` updates a stale one."""
    if f"TRL {version('trl')} ships" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page is about another version of TRL")
    page = written()
    assert names() == list(page)
    assert {name: cells_of(name) for name in SAMPLE} == {name: page[name] for name in SAMPLE}


@pytest.mark.parametrize("name", [name for name in SAMPLE if is_marked(name)])
def test_markers_are_followed(name: str) -> None:
    """Where a template marks what is produced, our targets are what TRL trains, but for white space."""
    assert name == marked_twin(name)
    found = {kind: try_row(name, row) for kind, row in ROWS.items()}
    assert [] == [kind for kind, outcome in found.items() if outcome.compared and not outcome.is_equal]


@pytest.mark.parametrize("name", SAMPLE)
def test_what_is_accepted_is_what_the_row_says(name: str) -> None:
    """Every word of the answers, calls and thoughts is a target once a row is accepted, and no word of others is."""
    assert {} == {kind: found.lost for kind, row in ROWS.items() if (found := try_row(name, row)).lost}


def test_the_twin_for_training_is_found_by_the_text() -> None:
    """For a model's own template that TRL knows, the one for training is named; for any other text none is."""
    own = [name for name in names() if f"{name}_training" in names()]
    twins = [(f"{name}_training", template_text(f"{name}_training")) for name in own]
    assert twins == [training_twin(template_text(name)) for name in own]
    assert [None, None] == [training_twin(text) for text in ("", CHATML)]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen3", "; TRL ships a training template for this model: chat_template: qwen3_training"),
        ("qwen2_5", "; qwen2_5_training, which TRL ships for training this model, does not either"),
    ],
)
def test_a_refusal_says_whether_the_twin_takes_the_row(name: str, hint: str) -> None:
    """Where another template is the remedy, the one that TRL ships for this model is tried."""
    tokenizer = RunTokenizer(byte_state(template_text(name)), Config(), None)
    thought = {"role": "assistant", "content": "Yes.", "reasoning_content": "Is it?"}
    row = Chat([{"role": "user", "content": "Is it?"}, thought, {"role": "user", "content": "So?"}, thought])
    with pytest.raises(RowError) as refusal:
        tokenizer.prepare(row)
    assert refusal.value.remedy.endswith(hint)
