"""A run that is watched, fed and controlled in a browser, and what becomes of it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from browsers import SECONDS
from daemons import SETTINGS, done, end, hold, is_in, rows_file, twin_of, until, watch
from ledgers import add_file, made_up_run
from processes import start_command

from onward import Run
from onward.layout import RunLayout
from onward.store.ledger import Ledger

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")

from pages import serve

sync_api = pytest.importorskip("playwright.sync_api")

HOSTILE = "<img src=x onerror=hacked=1>"


@contextmanager
def page_of(run: Run, log: Path) -> Iterator[str]:
    """Start `onward page`; gives the link that it prints first."""
    process = start_command(log, "page", "--port", "0", "--run", run.layout.root)
    try:
        until(lambda: log.exists() and "\n" in log.read_text(), process)
        yield log.read_text().splitlines()[0]
    finally:
        end(process)


@contextmanager
def stranger(html: str) -> Iterator[str]:
    """Serve a page of somebody else on this machine; gives its address."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            del format, arguments

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}/"
        server.shutdown()


def hostile_rows(path: Path) -> Path:
    """Write rows that would run a script in a page that shows them as HTML."""
    text = f"<script>hacked = 1</script>{HOSTILE}"
    ask, answer = {"role": "user", "content": text}, {"role": "assistant", "content": text}
    return tiny.write_jsonl(path, [{"messages": [ask, answer]}] * 4)


@pytest.mark.slow
def test_a_run_is_watched_fed_and_controlled_in_the_browser(tmp_path: Path, model: Path, browser: Any) -> None:
    """A live run is followed, paused and resumed, gets files, shows what it refuses and the rows it trains; nothing
    that a file says is run; another site can neither act nor frame the page; and the weights have the bits that they
    have without a page.
    """
    run = Run.create(tmp_path / "run", str(model), **SETTINGS)
    run.add(rows_file(tmp_path / "first.jsonl", 20))
    held = hold(run)
    daemon = watch(run, prepare=held)
    try:
        until(is_in(run, "first.jsonl"), daemon)
        with page_of(run, tmp_path / "page.log") as link:
            page = browser.new_page()
            page.goto(link)
            assert "token" not in page.url
            _is_live(page)
            _obeys(page, run)
            _cannot_be_attacked(browser, link, run)
            held.let_go.touch()
            _takes_files(page, tmp_path)
            _shows_rows(page)
            _talks(page)
            _fits(page)
            assert None is page.evaluate("window.hacked ?? null")
    finally:
        end(daemon)
    assert [] == browser.wrong
    twin = twin_of(run, model, [tmp_path / name for name in done(run)])
    assert state_digest(twin) == state_digest(run.layout.root)


def state_digest(run: Path) -> str:
    """Return the digest of weights, moments and counters of a run's newest commit."""
    with Ledger(run / "ledger.sqlite3", read_only=True) as ledger:
        newest = ledger.newest_checkpoint()
    assert newest is not None
    return newest.state_digest


def _is_live(page: Any) -> None:
    """The state, the file in training and its steps stand on the page, and the curve is drawn."""
    sync_api.expect(page.locator("#state-word")).to_have_text("training")
    sync_api.expect(page.locator("#doing")).to_have_text("")  # the same word is not shown twice
    sync_api.expect(page.locator("#going")).to_have_text("first.jsonl")
    sync_api.expect(page.locator("#files tr.going-on")).to_contain_text("first.jsonl")
    page.wait_for_selector("#curve[data-ready]")
    assert 4 == page.locator(".charts canvas").count()
    page.keyboard.press("Tab")
    sync_api.expect(page.locator(".skip")).to_be_focused()


def _obeys(page: Any, run: Run) -> None:
    """The buttons make the requests of the command line, and the answer is shown."""
    page.click("#pause")
    sync_api.expect(page.locator("#toasts")).to_contain_text("paused")
    sync_api.expect(page.locator("#state-word")).to_have_text("paused")
    assert "paused" == run.status()["state"]
    page.click("#resume")
    sync_api.expect(page.locator("#state-word")).to_have_text("training")


def _cannot_be_attacked(browser: Any, link: str, run: Run) -> None:
    """A site on this very machine, in the same browser: its requests are refused, its frame stays empty."""
    home = link.split("?")[0]
    attack = f"""<iframe src="{home}"></iframe><script>
      const how = {{ method: "POST", mode: "no-cors", credentials: "include", body: "{{}}" }};
      Promise.allSettled([fetch("{home}api/pause", how), fetch("{home}api/status", {{ credentials: "include" }})])
        .then((results) => {{ document.title = results.map((result) => result.status).join(); }});
    </script>"""
    with stranger(attack) as address:
        other = browser.new_page()
        other.goto(address.replace("localhost", "127.0.0.1"))
        other.wait_for_function("document.title !== ''")
        assert "rejected,rejected" == other.title()
        framed = other.frames[-1]
        assert 0 == framed.locator("#state-word").count()
        other.close()
    assert "training" == run.status()["state"]
    browser.wrong.clear()  # the browser says itself that it kept the stranger out


def _takes_files(page: Any, folder: Path) -> None:
    """Files that are dropped are trained or refused; a refused one shows its rows and what is wrong with them. What
    cannot be printed in a name is replaced.
    """
    good, evil = rows_file(folder / "good.jsonl", 4), hostile_rows(folder / f"{HOSTILE}.jsonl")
    bad = folder / "bad.jsonl"
    bad.write_text('{"text": 1}\n')
    broken = rows_file(folder / "two\nlines\u00a0.jsonl", 5)
    page.set_input_files("#pick", [good, evil, bad, broken])
    sync_api.expect(page.locator("#files tr", has_text="good.jsonl")).to_contain_text("done", timeout=SECONDS)
    sync_api.expect(page.locator("#files tr", has_text=HOSTILE)).to_contain_text("done", timeout=SECONDS)
    sync_api.expect(page.locator("#files tr", has_text="two_lines_.jsonl")).to_contain_text("done", timeout=SECONDS)
    broken.rename(folder / "two_lines_.jsonl")
    page.click("#refused summary")
    sync_api.expect(page.locator("#refused li")).to_contain_text("line 1:")


def _talks(page: Any) -> None:
    """Two states answer the same message, each in its column, which says which state it is."""
    page.check("#compare")
    page.fill("#heat", "0")
    page.fill("#message", HOSTILE)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".said .about")).to_have_count(2, timeout=SECONDS)
    sync_api.expect(page.locator(".said .mine").first).to_have_text(HOSTILE)
    for said in page.locator(".said .about").all():
        sync_api.expect(said).to_contain_text("after file")


def _shows_rows(page: Any) -> None:
    """A file's name opens its rows, what is trained marked; the keyboard closes them."""
    page.get_by_role("button", name=f"{HOSTILE}.jsonl").click()
    sync_api.expect(page.locator("#rows-title")).to_have_text(f"{HOSTILE}.jsonl")
    row = page.locator(".row").first
    sync_api.expect(row.locator("mark")).to_contain_text(f"<script>hacked = 1</script>{HOSTILE}<|im_end|>")
    page.get_by_text("Highest loss").click()
    sync_api.expect(row.locator("h3")).to_contain_text("loss")
    page.keyboard.press("Escape")
    assert not page.locator("#rows").evaluate("dialog => dialog.open")
    page.route("**/api/rows?*", lambda _: None)  # while another file is read, the rows of this one are gone
    page.get_by_role("button", name="good.jsonl").click()
    sync_api.expect(page.locator("#rows-title")).to_have_text("good.jsonl")
    sync_api.expect(row).to_have_count(0)
    page.keyboard.press("Escape")
    page.unroute("**/api/rows?*")


def _fits(page: Any) -> None:
    """Nothing of the page is wider than the screen; on a narrow one the stream needs no scrolling sideways either."""
    for width in (1440, 800, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert width >= page.evaluate("document.documentElement.scrollWidth")
    stream = page.locator("#stream")
    assert stream.evaluate("table => table.parentElement.scrollWidth <= table.parentElement.clientWidth")
    assert "First loss" in stream.locator("td[data-label]").nth(4).get_attribute("data-label")


@pytest.mark.slow
def test_the_page_follows_what_becomes_of_a_run(tmp_path: Path, browser: Any) -> None:
    """Whatever happens while it is open: a request is about the file that it was asked for, what was undone is not
    drawn any more, an answer can be stopped, a folder is told from a file, and no news is missed while it is apart.
    """
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 7), ("b.jsonl", 93)], lambda step: 1 / step)
    with Ledger(layout.ledger) as ledger:
        add_file(ledger, "c.jsonl", state="training", position=3, start_step=100, planned_steps=50)
    with serve([layout.root]) as served:
        page = browser.new_page()
        page.route("**/api/events", lambda route: route.fulfill(status=502))
        page.goto(f"{served.origin}/?token={served.key.token}")
        page.wait_for_selector("#curve[data-ready]")
        _misses_nothing(page, layout)
        _skips_what_was_meant(page, layout)
        _draws_no_undone_step(page, layout)
        _stops_an_answer(page)
        _takes_no_folder(page, tmp_path)


def _misses_nothing(page: Any, layout: RunLayout) -> None:
    """What happened while the page had no connection stands on it once it has one, whatever refused it meanwhile."""
    sync_api.expect(page.locator("#trouble")).to_contain_text("not connected")
    with Ledger(layout.ledger) as ledger:
        add_file(ledger, "missed.jsonl", state="queued", rows=1)
    page.unroute("**/api/events")
    sync_api.expect(page.locator("#files")).to_contain_text("missed.jsonl")
    sync_api.expect(page.locator("#waiting li", has_text="missed.jsonl").locator(".dim")).to_have_text("1 row")


def _skips_what_was_meant(page: Any, layout: RunLayout) -> None:
    """While the question is open the next file begins: the answer is about the file in the question, and Enter gives
    it.
    """
    page.click("#skip")
    sync_api.expect(page.locator("#ask-title")).to_have_text("Skip c.jsonl?")
    with Ledger(layout.ledger) as ledger:
        ledger.set_file(3, state="done")
        add_file(ledger, "d.jsonl", state="training", position=4, start_step=150, planned_steps=50)
    sync_api.expect(page.locator("#going")).to_have_text("d.jsonl")
    page.fill("#ask-fields input", "old")
    with page.expect_request("**/api/skip") as asked:
        page.keyboard.press("Enter")
    assert {"file": "file:3", "reason": "old"} == asked.value.post_data_json
    sync_api.expect(page.locator("#toasts")).to_contain_text("'file:3' is done")


def _draws_no_undone_step(page: Any, layout: RunLayout) -> None:
    """The steps that were looked at closely are undone: the page shows the run as it is."""
    page.click("#closer")
    sync_api.expect(page.locator("#readout")).to_contain_text("of 100")
    with Ledger(layout.ledger) as ledger:
        ledger.trim(7, [2], "undone")
        ledger.set_file(2, state="undone", position=None)
    sync_api.expect(page.locator("#readout")).to_have_text("7 steps · 1 file")


def _stops_an_answer(page: Any) -> None:
    """The button that sends a message stops its answer, and then sends the next one."""
    page.route("**/api/chat", lambda _: None)  # a model that thinks for long
    page.fill("#message", "Hello")
    page.click("#send")
    sync_api.expect(page.locator("#send")).to_have_text("Stop")
    page.click("#send")
    sync_api.expect(page.locator(".said .about")).to_have_text("stopped")
    sync_api.expect(page.locator("#send")).to_have_text("Send")


def _takes_no_folder(page: Any, tmp_path: Path) -> None:
    """A folder that is dropped is named as one."""
    folder = tmp_path / "rows"
    folder.mkdir()
    dropped = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.context.new_cdp_session(page).send(
            "Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": dropped}
        )
    sync_api.expect(page.locator("#toasts")).to_contain_text("rows is a folder")
