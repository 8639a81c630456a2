"""Who may look at a page and act on it, and how many at a time."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import onward, snapshot
from ledgers import made_up_run

from onward.layout import RunLayout
from onward.service.lock import RunLock

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")

from page_runs import FILES, falling
from pages import Page, serve

from onward.views.page.pages import STATIC
from onward.views.page.streams import FOLLOWERS
from onward.views.web.connections import MOST_QUIET


@pytest.mark.slow
def test_a_connection_on_which_nothing_comes_is_closed(made: RunLayout) -> None:
    """One that sends no head, half of one, or after its answer not the body that it announced."""
    beginnings = (
        b"",
        b"GET /api/status HT",
        b"PUT /api/inbox/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    )
    with serve([made.root], head_seconds=2.0) as page, contextlib.ExitStack() as opened:
        connections = [
            opened.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=30)) for _ in beginnings
        ]
        for connection, beginning in zip(connections, beginnings, strict=True):
            connection.sendall(beginning)
        said = [_said_until_closed(connection)[:12] for connection in connections]
        assert [b"", b"", b"HTTP/1.1 401"] == said


def test_many_connections_keep_nobody_out(made: RunLayout) -> None:
    """Of those that send nothing, only a limited number stay, and requests are answered."""
    with serve([made.root]) as page, contextlib.ExitStack() as opened:
        quiet = [
            opened.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=30))
            for _ in range(MOST_QUIET + 20)
        ]
        for connection in quiet:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: ")
        while len(closed := select.select(quiet, [], [], 30)[0]) < 20:
            pass
        assert [b""] * 20 == [_said_until_closed(connection) for connection in closed]
        kept = next(connection for connection in quiet if connection not in closed)
        kept.sendall(b"localhost\r\n\r\n")
        assert b"HTTP/1.1 401" == kept.recv(12)
        assert "idle" == page.get("/api/status")["state"]


def _said_until_closed(connection: socket.socket) -> bytes:
    """Return all that comes; a close with bytes that the server has not read yet is seen as a reset."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(65536):
            said += more
    return said


def test_only_so_many_follow_a_run(made: RunLayout) -> None:
    """Each browser that follows costs a connection; if there are too many, the next one is told so."""
    with serve([made.root]) as page, contextlib.ExitStack() as opened:
        for _ in range(FOLLOWERS):
            assert "status" == next(opened.enter_context(page.events()))[0]
        answer = page.ask("GET", "/api/events", headers=page.bearer)
        assert (503, "too many browsers follow this run") == (answer.status, answer.json["error"])
        assert "idle" == page.get("/api/status")["state"]


ADDRESSES = (
    ("GET", "/"), ("GET", "/api/status"), ("GET", "/api/history"), ("GET", "/api/metrics"), ("GET", "/api/events"),
    ("GET", "/api/curve"), ("GET", "/api/overview"), ("GET", "/api/rows"), ("GET", "/api/runs"), ("GET", "/metrics"),
    ("PUT", "/api/inbox/x.jsonl"), ("POST", "/api/pause"), ("POST", "/api/resume"), ("POST", "/api/stop"),
    ("POST", "/api/skip"), ("POST", "/api/chat"), ("POST", "/api/rollback"), ("POST", "/api/verify"),
)  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ADDRESSES)
def test_nothing_is_shown_or_done_without_the_token(page: Page, made: RunLayout, method: str, path: str) -> None:
    """Without the token, with a wrong one, from another site, under another name: refused, and nothing is revealed."""
    before = snapshot(made.root)
    good = page.bearer
    attempts: list[tuple[int, dict[str, str]]] = [
        (401, {}),
        (401, {"Authorization": "Bearer x"}),
        (401, {"Authorization": f"Basic {page.key.token}"}),
        (401, {"Cookie": f"onward_page_{page.port}={page.key.token}"}),
        (403, {**good, "Origin": "http://evil.example"}),
        (403, {**good, "Origin": "null"}),
        (403, {**good, "Origin": f"http://127.0.0.1:{page.port + 1}"}),
        (403, {**good, "Host": "evil.example"}),
        (403, {**good, "Host": f"127.0.0.1.evil.example:{page.port}"}),
        (403, {**good, "Host": f"me@127.0.0.1:{page.port}"}),
        (403, {**good, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}),
    ]
    if method != "GET":
        attempts.append((403, page.cookie))
    for status, headers in attempts:
        answer = page.ask(method, path, headers=headers)
        assert (status, True) == (answer.status, b"a.jsonl" not in answer.body), headers
    assert before == snapshot(made.root)


def test_the_link_becomes_a_cookie(page: Page) -> None:
    """The link leads to the page without its token, and leaves a cookie that no script and no other site can use."""
    answer = page.ask("GET", f"/?token={page.key.token}")
    assert (303, "/") == (answer.status, answer.headers["location"])
    cookie = answer.headers["set-cookie"]
    assert page.key.token not in cookie
    assert {"HttpOnly", "SameSite=strict", "Path=/"} == set(cookie.split("; ")[1:])
    assert 200 == page.ask("GET", "/api/status", headers={"Cookie": cookie.split(";")[0]}).status
    assert 200 == page.ask("GET", "/", headers={"Cookie": cookie.split(";")[0]}).status
    led = page.ask("GET", f"//evil.example/?token={page.key.token}&a=b")
    assert (303, "/evil.example/?a=b") == (led.status, led.headers["location"])
    from_mail = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    clicked = page.ask("GET", f"/?token={page.key.token}", headers=from_mail)
    assert (200, True) == (clicked.status, b'content="0; url=/"' in clicked.body)
    wrong = page.ask("GET", "/?token=wrong", headers={"Accept": "text/html"})
    assert (401, False) == (wrong.status, "set-cookie" in wrong.headers)
    assert b"needs its link" in wrong.body


def test_the_cookie_acts_for_the_page_itself(page: Page) -> None:
    """With the cookie a request has to say that it comes from the page."""
    asked = page.ask("POST", "/api/pause", headers={**page.cookie, "Origin": page.origin})
    assert "no process owns this run; the next onward watch begins paused" == asked.json["answer"]
    assert "paused" == page.get("/api/status")["state"]
    assert "no longer paused; onward watch continues the run" == page.post("/api/resume").json["answer"]
    assert "no process owns this run" == page.post("/api/stop", {"after_file": True}).json["answer"]
    wrongs = [("pause", {"release": 1}), ("skip", {"file": 3}), ("skip", {"file": ""}), ("skip", {}), ("rollback", {})]
    for path, wrong in wrongs:
        assert 400 == page.post(f"/api/{path}", wrong).status
    assert 400 == page.ask("POST", "/api/pause", b"[1]", page.bearer).status
    assert 400 == page.ask("POST", "/api/pause", b"x" * 70_000, page.bearer).status


@pytest.mark.slow
def test_what_needs_a_still_state_says_so(page: Page, made: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proof and going back are commands in processes of their own; what they refuse is answered in their words, not in
    those of Python or a library that spoke before."""
    monkeypatch.setenv("PYTHONWARNINGS", "unknown")  # Python says that it does not know it
    with RunLock(made.lock):
        held = page.post("/api/verify")
    assert (409, True) == (held.status, held.json["error"].startswith("another process owns this run"))
    back = page.post("/api/rollback", {"to": "--help", "requeue": True})
    assert (400, True) == (back.status, back.json["error"].startswith("'--help' is neither a finished file"))
    assert back.json["hint"]


@pytest.mark.parametrize(
    "wish",
    [
        {}, {"messages": []}, {"messages": "x"}, {"messages": [{"role": "user"}]}, {"messages": [1]},
        {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": "x"}], "at": 3},
        {"messages": [{"role": "user", "content": "x"}], "seed": True},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10**6},
        {"messages": [{"role": "user", "content": "x"}], "temperature": "0"},
        {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
        {"messages": [{"role": "user", "content": "x"}], "seed": 2**64},
        {"messages": [{"role": "user", "content": "x"}], "top_p": 0.5},
        {"messages": [{"role": "assistant", "content": "x"}]},
    ],
)  # fmt: skip
def test_a_question_that_makes_no_sense_starts_no_model(page: Page, wish: dict[str, Any]) -> None:
    """What cannot be asked is refused before the process that answers is started."""
    assert 400 == page.post("/api/chat", wish).status


def test_trouble_is_told_and_looked_at_again(tmp_path: Path) -> None:
    """A ledger that goes away while a browser follows is reported; when it is back, the state is sent again."""
    layout = made_up_run(tmp_path / "run", FILES, falling)
    with serve([layout.root]) as page, page.events() as events:
        assert "status" == next(events)[0]
        next(events)
        layout.ledger.rename(tmp_path / "away")
        name, value = next(event for event in events if event[0] != "status")
        assert ("trouble", True) == (name, "no run" in value["error"])
        (tmp_path / "away").rename(layout.ledger)
        assert "idle" == next(event for event in events if event[0] == "status")[1]["state"]


def test_a_page_for_reading_only_changes_nothing(made: RunLayout) -> None:
    """With `read_only` everything that changes something is refused, token or not, and the page has no buttons."""
    before = snapshot(made.root)
    with serve([made.root], read_only=True) as page:
        for method, path in ADDRESSES:
            if method != "GET":
                assert 403 == page.ask(method, path, b"{}", page.bearer).status
        html = page.ask("GET", "/", headers=page.bearer).body
        assert 200 == page.ask("HEAD", "/", headers=page.bearer).status
        assert page.get("/api/history")
    assert b'id="pause"' not in html
    assert b'data-read-only="yes"' in html
    assert before == snapshot(made.root)


@pytest.mark.parametrize("path", ["/", "/api/status", "/nothing", "/static/js/main.js", "/api/metrics?every=x"])
def test_every_answer_forbids_what_no_page_needs(page: Page, path: str) -> None:
    """No script or style but the page's own, no frame, no sniffing; nothing of a run is kept in a cache."""
    headers = page.ask("GET", path, headers=page.bearer).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    none, own = ("default-src", "base-uri", "form-action", "frame-ancestors"), ("script", "style", "img", "connect")
    allowed = {**dict.fromkeys(none, "'none'"), **{f"{kind}-src": "'self'" for kind in own}}
    assert {**allowed, "require-trusted-types-for": "'script'"} == policy
    assert ("nosniff", "no-referrer") == (headers["x-content-type-options"], headers["referrer-policy"])
    assert ("no-cache" if "static" in path else "no-store") == headers["cache-control"]
    assert not {"server", "access-control-allow-origin"} & headers.keys()


def test_html_has_no_script_of_its_own(page: Page) -> None:
    """No page has inline script, style or handlers, so that the policy above holds."""
    templates = sorted((STATIC.parent / "templates").glob("*.html"))
    assert 5 == len(templates)
    for text in (path.read_text() for path in templates):
        assert not re.search(r"<style|<script(?![^>]* src=)|<[^>]*\s(style|on[a-z]+)=", text)
    assert 404 == page.ask("GET", "/static/../pages.py", headers=page.bearer).status


def test_the_title_of_a_run_is_text(tmp_path: Path) -> None:
    """A run whose directory is named like a script is shown by its name."""
    layout = made_up_run(tmp_path / "<img src=x>", [], falling)
    with serve([layout.root]) as page:
        assert b"<h1>&lt;img src=x&gt;</h1>" in page.ask("GET", "/", headers=page.bearer).body


def test_a_page_without_its_extra_says_what_to_install() -> None:
    """Where the server is missing, the command says how to get it."""
    code = "import sys; sys.modules['uvicorn'] = None; from onward import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "page"], capture_output=True, text=True, check=False)
    assert (2, True) == (done.returncode, "pip install 'onward[page]'" in done.stderr)


@pytest.mark.parametrize("words", [("--port", "1", "--host", "192.0.2.1"), ("nowhere",)])
def test_a_page_that_cannot_be_had_is_refused(made: RunLayout, words: tuple[str, ...]) -> None:
    """An address that is not this machine's, or a directory without a run: a line and a status."""
    outcome = onward("page", *words, "--run", made.root)
    assert (2, "") == (outcome.status, outcome.out)
    assert "onward init" in outcome.err or "cannot listen" in outcome.err
