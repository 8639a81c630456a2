"""Who reads the page with the keyboard or a screen reader stays where they are when news comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ledgers import add_file, made_up_run

from onward.layout import RunLayout
from onward.store.ledger import Ledger

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")

from pages import serve

sync_api = pytest.importorskip("playwright.sync_api")


def made(directory: Path) -> RunLayout:
    """A run with a finished file, one in training, and a refused one."""
    layout = made_up_run(directory, [("a.jsonl", 7)], lambda step: 1 / step)
    with Ledger(layout.ledger) as ledger:
        add_file(ledger, "b.jsonl", state="training", position=2, start_step=7, planned_steps=50)
    problems = [{"line": 1, "reason": "text is a number", "remedy": None}]
    report = {"file": "bad.jsonl", "unit": "line", "rejected": 1.0, "problem_count": 1, "problems": problems}
    (layout.rejected / "bad.jsonl.report.json").write_text(json.dumps(report))
    return layout


def test_the_list_of_runs_keeps_the_focus_and_says_what_is_wrong_with_a_run(tmp_path: Path, browser: Any) -> None:
    """It is read again every few seconds: the link that has the focus keeps it, also while its run changes."""
    first, second = (made(tmp_path / name) for name in ("first", "second"))
    with serve([first.root, second.root]) as served:
        page = browser.new_page()
        page.goto(f"{served.origin}/?token={served.key.token}")
        page.get_by_role("link", name="second").focus()
        with Ledger(second.ledger) as ledger:
            ledger.put(state="failed", problem="the disk is full")
        sync_api.expect(page.locator("#runs tr", has_text="second")).to_contain_text("the disk is full")
        sync_api.expect(page.get_by_role("link", name="second")).to_be_focused()


@pytest.mark.slow
def test_what_has_the_focus_keeps_it_when_news_comes(tmp_path: Path, browser: Any) -> None:
    """A file in the stream and a refused one are where they were, when files arrive and one in training is done."""
    layout = made(tmp_path / "run")
    with serve([layout.root]) as served:
        page = browser.new_page()
        page.goto(f"{served.origin}/?token={served.key.token}")
        page.wait_for_selector("#curve[data-ready]")
        training, refused = page.get_by_role("button", name="b.jsonl"), page.locator("#refused summary")
        training.focus()
        with Ledger(layout.ledger) as ledger:
            add_file(ledger, "c.jsonl", state="queued", rows=3)
        sync_api.expect(page.locator("#files")).to_contain_text("c.jsonl")
        sync_api.expect(training).to_be_focused()
        with Ledger(layout.ledger) as ledger:
            ledger.set_file(2, state="done")
        sync_api.expect(page.locator("#files tr", has_text="b.jsonl")).to_contain_text("done")
        sync_api.expect(training).to_be_focused()
        refused.focus()
        page.keyboard.press("Enter")
        with Ledger(layout.ledger) as ledger:
            add_file(ledger, "d.jsonl", state="queued", rows=3)
        sync_api.expect(page.locator("#waiting")).to_contain_text("d.jsonl")
        sync_api.expect(refused).to_be_focused()
        sync_api.expect(page.locator("#refused li")).to_be_visible()


@pytest.mark.slow
def test_the_file_in_training_is_in_sight_however_many_wait(tmp_path: Path, browser: Any) -> None:
    """Of those that wait, the stream begins with the next three; a button and the search show the others."""
    layout = made(tmp_path / "run")
    with Ledger(layout.ledger) as ledger:
        for number in range(300):
            add_file(ledger, f"waits-{number}.jsonl", state="queued")
    with serve([layout.root]) as served:
        page = browser.new_page()
        page.goto(f"{served.origin}/?token={served.key.token}")
        rows = page.locator("#files tr")
        sync_api.expect(rows).to_have_count(5)
        named = [
            name.split(":")[0] for name in page.locator("#files .name").evaluate_all("all => all.map(n => n.title)")
        ]
        assert ["waits-2.jsonl", "waits-1.jsonl", "waits-0.jsonl", "b.jsonl", "a.jsonl"] == named
        page.fill("#find", "waits-29")
        sync_api.expect(rows).to_have_count(11)
        page.fill("#find", "")
        page.get_by_role("button", name="Show all 302").click()
        sync_api.expect(rows).to_have_count(302)
