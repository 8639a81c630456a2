"""What a page shows in a browser: names that are long or begin alike, and no scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ledgers import made_up_run

from onward.store.ledger import Ledger

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")

from pages import serve

sync_api = pytest.importorskip("playwright.sync_api")


@pytest.mark.slow
def test_files_whose_names_begin_alike_can_be_told_apart_in_the_grid(tmp_path: Path, browser: Any) -> None:
    """A name is cut off where it is longer than its cell: the file's position stands before it. On paper, nothing is
    cut off at an edge, and what cannot be pressed is left out.
    """
    names = [f"2026-11-27-support-chats-part-{number:04d}.jsonl" for number in range(2)]
    layout = made_up_run(tmp_path / "run", [(name, 3) for name in names], float)
    with Ledger(layout.ledger) as ledger:
        for file_id, key in enumerate("ab", start=1):
            ledger.set_file(file_id, sha256=key)
            score = {"loss": 1.0, "accuracy": 0.5, "tokens": 5, "rows": [1], "trained": False}
            grid = {"model": {key: score}, "base": {}, "anchor": None, "names": {}, "cost": 1}
            ledger.keep_boundary_results(file_id, file_id, {"grid": grid})
    with serve([layout.root]) as served:
        page = browser.new_page()
        page.goto(f"{served.origin}/?token={served.key.token}")
        heads = page.locator("#grid-table th")
        expected = ["After", f"1 {names[0]}", f"2 {names[1]}", "the base", f"1 {names[0]}", f"2 {names[1]}"]
        sync_api.expect(heads).to_have_text(expected)
        page.emulate_media(media="print", color_scheme="dark")
        assert "rgb(255, 255, 255)" == page.evaluate("getComputedStyle(document.body).backgroundColor")
        clipped = "[...document.querySelectorAll('.scroll')].filter((e) => getComputedStyle(e).overflow !== 'visible')"
        assert 0 == page.evaluate(f"{clipped}.length")
        sync_api.expect(page.locator("#theme")).to_be_hidden()


def test_a_long_name_leaves_room_for_what_is_said_of_it(tmp_path: Path, browser: Any) -> None:
    """It is cut off after two lines: in the list of runs, whose columns all stay on the screen, and in the inbox."""
    long = made_up_run(tmp_path / ("x" * 150), [("a.jsonl", 3)], float)
    other = made_up_run(tmp_path / "other", [("a.jsonl", 3)], float)
    (long.inbox / f"{'y' * 240}.jsonl").write_text("{}")
    with serve([long.root, other.root]) as served:
        page = browser.new_page()
        page.set_viewport_size({"width": 800, "height": 900})
        page.goto(f"{served.origin}/?token={served.key.token}")
        sync_api.expect(page.locator("#runs tr")).to_have_count(2)
        assert page.locator(".scroll").evaluate("list => list.scrollWidth <= list.clientWidth")
        page.click("#runs a >> nth=0")
        sync_api.expect(page.locator("#waiting li")).to_have_count(1)
        two_lines = "name => name.clientHeight <= 2 * parseFloat(getComputedStyle(name).lineHeight) + 1"
        assert page.locator("#waiting .grow").evaluate(two_lines)


def test_without_scripts_the_page_says_what_it_needs(tmp_path: Path, browser: Any) -> None:
    """A browser that runs no JavaScript shows why nothing happens, with the commands that tell the same."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 3)], float)
    other = made_up_run(tmp_path / "other", [("a.jsonl", 3)], float)
    plain = browser.browser.new_context(java_script_enabled=False)
    for runs in ([layout.root], [layout.root, other.root]):
        with serve(runs) as served:
            page = plain.new_page()
            page.goto(f"{served.origin}/?token={served.key.token}")
            assert "This page needs JavaScript" in page.content()
            sync_api.expect(page.locator("noscript code").first).to_be_visible()
