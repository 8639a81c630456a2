from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import onward, snapshot
from documented import DOCS, blocks_for
from faults import copy_run
from ledgers import add_file, made_up_run

import onward as onward_package
from onward.layout import RunLayout
from onward.service.lock import RunLock
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")

from pages import Page, serve

from onward.views.page.pages import STATIC
from onward.views.page.reading import RunReader
from onward.views.page.rows import RowsOfFiles
from onward.views.page.runs import find_runs
from onward.views.page.streams import FOLLOWERS, Seen, Watcher
from onward.views.page.upload import remove_dead_parts, require_name
from onward.views.web.connections import MOST_QUIET

FILES = [("a.jsonl", 7), ("b.jsonl", 93)]
HOSTILE = "<script>alert(1)</script>"


def falling(step: int) -> float:
    """A loss that falls, with a peak."""
    return 50.0 if step == 33 else 5.0 / step


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    """A run of 100 made-up steps in two files, which nobody trains."""
    return made_up_run(tmp_path_factory.mktemp("page") / "made", FILES, falling)


@pytest.fixture(scope="module")
def page(made: RunLayout) -> Iterator[Page]:
    """Its page."""
    with serve([made.root]) as served:
        yield served


def files_in(layout: RunLayout) -> list[str]:
    """Names of everything in the inbox."""
    return sorted(path.name for path in layout.inbox.rglob("*"))


# what is answered


def test_status_and_history_are_those_of_the_command_line(page: Page, made: RunLayout) -> None:
    """The page and `--json` say the same."""
    assert onward("history", "--run", made.root, "--json").json == page.get("/api/history")
    said, shown = onward("status", "--run", made.root, "--json").json, page.get("/api/status")
    assert said.keys() == shown.keys()
    assert {**said, "disk_free_bytes": 0} == {**shown, "disk_free_bytes": 0}


def test_metrics_are_columns_thinned_on_the_server(page: Page) -> None:
    """`every` thins the records, and the highest loss stays."""
    columns = page.get("/api/metrics?every=1")
    names = "step file file_step loss learning_rate grad_norm rows tokens target_tokens seconds time"
    assert names.split() == list(columns)
    assert list(range(1, 101)) == columns["step"]
    assert ["a.jsonl"] * 7 + ["b.jsonl"] * 93 == columns["file"]
    thin = page.get("/api/metrics?every=20")
    assert [33, 40, 41, 80, 81, 100] == thin["step"]
    assert columns == page.get("/api/metrics")
    assert 400 == page.ask("GET", "/api/metrics?every=0", headers=page.bearer).status


def test_the_curve_of_a_part_is_closer(tmp_path: Path) -> None:
    """The whole run is drawn in ranges with their extremes, a part step by step; files are named with their steps."""
    layout = made_up_run(tmp_path / "long", [("a.jsonl", 1500), ("b.jsonl", 1500)], falling)
    with serve([layout.root]) as page:
        whole = page.get("/api/curve?points=100")
        part = page.get("/api/curve?points=100&first=21&last=60")
    steps = whole["columns"]["step"]
    assert (1500, 2, 3000) == (len(steps), steps[0], steps[-1])
    assert 50.0 == max(whole["columns"]["loss_max"])
    assert [["a.jsonl", 1, 1, 1500], ["b.jsonl", 2, 1501, 3000]] == whole["files"]
    assert [falling(step) for step in (21, 22)] == pytest.approx(part["columns"]["loss"][:2], rel=1e-5)
    assert list(range(21, 61)) == part["columns"]["step"]
    assert [["a.jsonl", 1, 1, 1500]] == part["files"]


def test_what_stands_around_the_curve(tmp_path: Path) -> None:
    """Inbox, queue, refused files row by row, handovers and events are returned as they are, whatever is in them."""
    layout = made_up_run(tmp_path / "around", FILES, falling)
    layout.inbox.joinpath("next.jsonl.part").write_text("half")
    for step in (0, 7):
        layout.boundaries.joinpath(f"step-{step}").mkdir()
    problems = [{"line": 3, "reason": HOSTILE, "remedy": "mend it"}]
    report = {"file": "bad.jsonl", "problem_count": 1, "unit": "line", "rejected": 5.0, "problems": problems}
    layout.rejected.joinpath("bad.jsonl.report.json").write_text(json.dumps(report))
    layout.rejected.joinpath("mine.report.json").write_text("[1]")
    with Ledger(layout.ledger) as ledger:
        add_file(ledger, HOSTILE, state="queued")
        ledger.add_event("warning", HOSTILE, kind="x")
        measured = dict.fromkeys(("before", "after"), json.dumps({"probe_loss": 2.5}))
        ledger.add_handover(kind="boundary", step=0, file_id=1, name="bitwise", difference=0.0, **measured)
    with serve([layout.root]) as page:
        around = page.get("/api/overview")
    assert [("next.jsonl.part", False)] == [(file["name"], file["whole"]) for file in around["inbox"]]
    assert [(HOSTILE, "queued")] == [(file["name"], file["state"]) for file in around["queue"]]
    assert [{**report, "way_out": ""}] == around["refused"]
    assert {"bitwise": 1} == around["proof"]["classes"]
    assert [("a.jsonl", 2.5)] == [(entry["file"], entry["loss"]) for entry in around["proof"]["handovers"]]
    assert HOSTILE == around["events"][-1]["message"]
    assert 1 << 20 == around["disk"]["reserve"]
    assert [(0, None), (7, "a.jsonl")] == sorted((point["step"], point["file"]) for point in around["restore_points"])


def test_events_tell_the_state_then_what_changes(tmp_path: Path) -> None:
    """A browser first gets the state, then each new step once, and what else to read again."""
    layout = made_up_run(tmp_path / "live", FILES, falling)
    with serve([layout.root]) as page, page.events() as events:
        name, status = next(events)
        assert ("status", str(layout.root)) == (name, status["run"])
        next(events)  # the first look
        metrics = Metrics(layout.ledger, clock=lambda: 7.0)
        metrics.append(StepRecord(2, 101, 94, 0, 2, "digest", 20, 10, 0.25, 1e-4, 0.5, 0.25))
        metrics.close()
        name, steps = next(event for event in events if event[0] != "status")
        assert ("steps", [101], [0.25], [7.0]) == (name, steps["step"], steps["loss"], steps["time"])
        with Ledger(layout.ledger) as ledger:
            add_file(ledger, "new.jsonl", state="queued")
        assert ("changed", ["history"]) == next(event for event in events if event[0] != "status")
        layout.inbox.joinpath("c.jsonl").write_text("{}")
        assert ("changed", ["overview"]) == next(event for event in events if event[0] != "status")
        with Ledger(layout.ledger) as ledger:
            ledger.trim(50, [2], "undone")
        assert ("changed", ["curve"]) == next(event for event in events if event[0] != "status")


def test_events_are_a_list_where_json_is_wanted(page: Page, made: RunLayout) -> None:
    """Who accepts JSON alone gets what happened, and no stream."""
    answer = page.ask("GET", "/api/events", headers={**page.bearer, "Accept": "application/json"})
    with Ledger(made.ledger, read_only=True) as ledger:
        assert [event.message for event in ledger.events()] == [event["message"] for event in answer.json]


def test_steps_that_others_replaced_are_drawn_anew(tmp_path: Path) -> None:
    """Between two looks a file was undone and another one trained beyond its last step: nothing of it stays drawn. A
    look that fails after it has read that does not keep it from being told by the next one."""

    class FailingOnce(Watcher):
        fails = False

        def _steps(self, ledger: Ledger, now: Seen) -> Any:
            found = super()._steps(ledger, now)
            if self.fails:
                self.fails = False
                raise sqlite3.OperationalError("disk I/O error")
            return found

    layout = made_up_run(tmp_path / "run", FILES, falling)
    watcher = FailingOnce(RunReader(layout))
    watcher.look()
    with Ledger(layout.ledger) as ledger:
        ledger.trim(7, [2], "undone")
        ledger.set_file(2, state="undone", position=None)
        other = add_file(ledger, "other.jsonl", state="done", position=2, start_step=7)
    metrics = Metrics(layout.ledger, clock=lambda: 7.0)
    for step in range(8, 102):
        metrics.append(StepRecord(other, step, step - 7, 0, 2, "digest", 20, 10, 0.25, 1e-4, 0.5, 0.25))
    metrics.close()
    watcher.fails = True
    assert [("trouble", {"error": "disk I/O error"})] == watcher.look()
    assert ("changed", ["curve"]) in watcher.look()
    assert [] == [message for message in watcher.look() if message[0] != "status"]


def test_a_look_under_way_ends_before_its_ledger_is_closed(made: RunLayout) -> None:
    """Closed under a thread that reads it, SQLite's connection ends the process."""
    looks, ends, order = threading.Event(), threading.Event(), list[str]()

    class Slow(Watcher):
        def _changes(self, ledger: Ledger) -> Any:
            looks.set()
            ends.wait(30)
            found = super()._changes(ledger)
            order.append("looked")
            return found

        def _close(self) -> None:
            ends.set()
            super()._close()
            order.append("closed")

    async def follow_and_end() -> None:
        watcher = Slow(RunReader(made))
        followed = watcher.follow()
        assert "status" == (await anext(followed)).event
        waiting = asyncio.create_task(anext(followed))
        await asyncio.to_thread(looks.wait, 30)
        await watcher.end()
        waiting.cancel()

    asyncio.run(follow_and_end())
    assert ["looked", "closed"] == order


QUERIES = ("metrics", "curve", "rows", "status", "history", "events", "overview", "grid")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", f"/api/{name}") for name in QUERIES),
        ("GET", "/metrics"),
        *(("POST", f"/api/{name}") for name in ("pause", "resume", "stop", "skip", "chat", "rollback", "verify")),
        ("PUT", "/api/inbox/a.jsonl"),
    ],
)
def test_a_query_that_would_be_ignored_is_refused(page: Page, made: RunLayout, method: str, path: str) -> None:
    """A misspelt key, or an option of a request that belongs into its body, is named, and nothing is done."""
    answer = page.ask(method, f"{path}?evry=2", None if method == "GET" else b"{}", page.bearer)
    assert (400, "evry") == (answer.status, answer.json["where"])
    assert [] == list(made.inbox.iterdir())


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "where"),
    [
        ("GET", "/api/nothing", {}, 404, None),
        ("DELETE", "/api/status", {}, 405, None),
        ("GET", "/api/metrics?every=0", {}, 400, "every"),
        ("GET", "/api/status", {"Authorization": ""}, 401, None),
        ("GET", "/api/status", {"Host": "elsewhere"}, 403, None),
        ("GET", "/api/status", {"Origin": "http://elsewhere"}, 403, None),
        ("POST", "/api/pause", {}, 400, "now"),
        ("POST", "/api/stop", {}, 400, "now"),
        ("POST", "/api/rollback", {}, 400, "now"),
        ("POST", "/api/verify", {}, 400, "now"),
    ],
)
def test_every_error_has_one_shape(
    page: Page, method: str, path: str, headers: dict[str, str], status: int, where: str | None
) -> None:
    """What, where and the way out, as JSON, whoever refuses; a key that would be ignored is refused, too."""
    answer = page.ask(method, path, b'{"now": true}' if method == "POST" else None, {**page.bearer, **headers})
    assert (status, "application/json") == (answer.status, answer.headers["content-type"])
    assert {"error", "where", "hint"} <= set(answer.json)
    assert where == answer.json["where"]
    if status == 405:
        assert {"GET", "HEAD"} == set(answer.headers["allow"].split(", "))


def test_the_head_of_the_events_ends(page: Page) -> None:
    """Who asks for the head of a stream alone gets it, and follows nothing."""
    answer = page.ask("HEAD", "/api/events", headers=page.bearer)
    assert (200, b"") == (answer.status, answer.body)
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_rows_are_shown_as_the_model_sees_them(untouched: Path) -> None:
    """The rows of a file in several views, what is trained marked; looking changes nothing of the run."""
    with serve([untouched]) as page:
        (entry,) = page.get("/api/history")
        where = f"/api/rows?sha256={entry['sha256']}&position=1"
        rows = page.get(f"{where}&limit=3")
        assert (8, 8, True) == (rows["count"], rows["rows_of_file"], rows["is_whole"])
        first = rows["rows"][0]
        assert "<|im_start|>user\n" == first["segments"][0]["text"][:17]
        assert first["segments"][1]["trained"]
        assert first["segments"][1]["text"].endswith(".<|im_end|>")
        lengths = [row["tokens"] for row in page.get(f"{where}&view=longest")["rows"]]
        assert sorted(lengths, reverse=True) == lengths
        costly = page.get(f"{where}&view=loss")["rows"]
        assert sorted((row["loss"] for row in costly), reverse=True) == [row["loss"] for row in costly]
        assert {row["line"] for row in costly} == set(range(1, 9))
        assert [] == page.get(f"{where}&view=cut")["rows"] == page.get(f"{where}&view=dropped")["rows"]
        for wrong in ("/api/rows?sha256=abc", f"{where}&view=x", f"{where}&offset=-1"):
            assert 400 == page.ask("GET", wrong, headers=page.bearer).status


def test_rows_of_a_file_that_waits_are_those_of_the_config_now(run: Path, tmp_path: Path) -> None:
    """The config is changed while the rows are looked at: the next look shows which are left out under the new one."""
    layout = RunLayout(copy_run(run, tmp_path / "run"))
    rows = RowsOfFiles(layout)
    with Ledger(layout.ledger, read_only=True) as ledger:
        waits = replace(ledger.file(1), state="queued", config=None)
        before = rows.page(ledger, waits, "all", 0, 1)["counts"]
        layout.config.write_text(layout.config.read_text().replace("max_length: 256", "max_length: 16"))
        after = rows.page(ledger, waits, "all", 0, 1)["counts"]
    assert [{"cut": 0, "dropped": 0, "all": 8}, {"cut": 0, "dropped": 8, "all": 0}] == [before, after]


def test_rows_of_a_file_that_waits_are_found_by_its_place(tmp_path: Path) -> None:
    """The history gives a waiting file the place that it will have, and the page asks by that."""
    layout = made_up_run(tmp_path / "run", FILES, falling)
    with Ledger(layout.ledger) as ledger:
        add_file(ledger, "waits.jsonl", state="queued", sha256="ab")
    with serve([layout.root]) as page:
        entry = page.get("/api/history")[-1]
        where = f"/api/rows?sha256=ab&position={entry['position']}"
        assert "original of waits.jsonl is missing" in page.ask("GET", where, headers=page.bearer).json["error"]
        assert 400 == page.ask("GET", "/api/rows?sha256=ab&position=1&view=x", headers=page.bearer).status


def test_prometheus_reads_the_state(page: Page) -> None:
    """`/metrics` has the state in Prometheus' text format, behind the token."""
    answer = page.ask("GET", "/metrics", headers=page.bearer)
    lines = answer.body.decode().splitlines()
    assert "text/plain; version=0.0.4; charset=utf-8" == answer.headers["content-type"]
    assert 'onward_loss{run="made"} 0.05' in lines
    assert 'onward_state{run="made",state="idle"} 1.0' in lines
    assert 'onward_state{run="made",state="training"} 0.0' in lines
    assert 'onward_files{run="made",state="done"} 2.0' in lines
    assert not any(line.startswith("onward_eta_seconds") for line in lines)
    assert 401 == page.ask("GET", "/metrics").status


def test_several_runs_are_listed_and_kept_apart(tmp_path: Path) -> None:
    """A folder of runs lists them; each has its addresses below its name, and damage in one leaves the others."""
    made_up_run(tmp_path / "one", FILES, falling)
    other = made_up_run(tmp_path / "the other", FILES[:1], falling)
    with serve([tmp_path]) as page:
        assert ["one", "the-other"] == [run["name"] for run in page.get("/api/runs")]
        assert 2 == len(page.get("/runs/one/api/history"))
        assert 1 == len(page.get("/runs/the-other/api/history"))
        assert 404 == page.ask("GET", "/api/history", headers=page.bearer).status
        assert b"the other" in page.ask("GET", "/runs/the-other/", headers=page.bearer).body
        other.ledger.rename(tmp_path / "away")
        states = {run["title"]: run["error"] is None for run in page.get("/api/runs")}
        assert {"one": True, "the other": False} == states
        lines = page.ask("GET", "/metrics", headers=page.bearer).body.decode().splitlines()
        assert {'onward_problem{run="one"} 0.0', 'onward_problem{run="the-other"} 1.0'} <= set(lines)
        assert 400 <= page.ask("GET", "/runs/the-other/api/status", headers=page.bearer).status < 600


def test_names_of_runs_are_plain_and_unique(tmp_path: Path) -> None:
    """Directories of the same name get addresses of their own; one given twice is one run."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        made_up_run(tmp_path / folder / "my <run>", [], falling)
    runs = find_runs([tmp_path / "a", tmp_path / "b" / "my <run>", tmp_path / "b"])
    assert [("my-run", "my <run>"), ("my-run-2", "my <run>")] == [(run.name, run.title) for run in runs]


# uploads


@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_file_is_sent_into_the_inbox(page: Page, made: RunLayout, in_chunks: bool) -> None:
    """A file of any size arrives whole under its name, announced or not, and nothing else stays."""
    data = os.urandom(5 << 20)
    pieces = (data[start : start + 99_999] for start in range(0, len(data), 99_999))
    name = f"zwölf rows {in_chunks}.jsonl"
    answer = page.put(f"/api/inbox/{name.replace(' ', '%20').replace('ö', '%C3%B6')}", pieces if in_chunks else data)
    assert (201, {"name": name, "bytes": len(data)}) == (answer.status, answer.json)
    assert [name] == files_in(made)
    assert data == (made.inbox / name).read_bytes()
    again = page.put(f"/api/inbox/{name.replace(' ', '%20').replace('ö', '%C3%B6')}", b"other")
    assert (409, data) == (again.status, (made.inbox / name).read_bytes())
    (made.inbox / name).unlink()


@pytest.mark.parametrize(
    "path",
    [
        "..%2Fonward.yaml", "..%2f..%2fetc%2fpasswd", "%2e%2e", "%2Fetc%2Fpasswd", "high%2Fx.jsonl", "a%2F..%2F..%2Fx",
        "..%5Cx.jsonl", "a%00.jsonl", ".hidden", "x.part", "x.TMP", "x~", "high", "low", "%E2%80%AEtxt.jsonl",
        "a%0Ab.jsonl", "x" * 256, "../onward.yaml", "",
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_refused(page: Page, made: RunLayout, path: str) -> None:
    """Tricks with paths and names that the inbox would pass over put nothing anywhere."""
    before = snapshot(made.root)
    head = f"PUT /api/inbox/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {page.key.token}\r\n"
    status = page.raw(f"{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode()).split(b" ")[1]
    assert status in (b"400", b"404", b"405")
    assert before == snapshot(made.root)
    assert [] == files_in(made)


@pytest.mark.parametrize("character", ["%0A", "%0D", "%09", "%E2%80%A8", "%C2%A0"])
def test_a_name_that_cannot_be_printed_is_said_to_be_that(page: Page, made: RunLayout, character: str) -> None:
    """Every name of a file is an address that the page knows, and is refused for what it is, with the way out."""
    for name in (f"a{character}b.jsonl", f"{character}.jsonl", f"a.jsonl{character}"):
        answer = page.put(f"/api/inbox/{name}", b"{}")
        assert (400, "the name has characters that cannot be printed") == (answer.status, answer.json["error"])
        assert "plain name" in answer.json["hint"]
    assert [] == files_in(made)


def test_a_file_that_does_not_fit_is_refused_before_it_is_sent(page: Page, made: RunLayout) -> None:
    """A size above the free disk is refused at once: nothing of 10 TB is read."""
    head = f"PUT /api/inbox/large.jsonl HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n"
    answer = page.raw(f"{head}Content-Length: {10 << 40}\r\n\r\n".encode())
    assert b"507" == answer.split(b" ")[1]
    assert [] == files_in(made)


@pytest.mark.parametrize("in_chunks", [False, True])
def test_an_upload_leaves_the_margin_of_the_disk_free(tmp_path: Path, in_chunks: bool) -> None:
    """What training needs of the disk stays free, whether a size is announced or not, and nothing half stays."""
    layout = made_up_run(tmp_path / "run", [], falling)
    layout.config.write_text(f"model: m\ndisk_margin_mb: {1 << 30}\n")
    with serve([layout.root]) as page:
        answer = page.put("/api/inbox/x.jsonl", iter([b"x"] * 3) if in_chunks else b"xxx")
    assert 507 == answer.status
    assert "no room" in answer.json["error"]
    assert [] == files_in(layout)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/inbox/x.part", {}, 400), ("/api/nothing", {}, 404),
        ("/api/inbox/x.jsonl", {"Host": "evil.example"}, 403),
        ("/api/inbox/x.jsonl", {"Authorization": "Bearer wrong"}, 401),
    ],
)  # fmt: skip
def test_a_sender_sees_why_a_file_is_refused(page: Page, path: str, headers: dict[str, str], status: int) -> None:
    """Whoever sends all of a large file before reading the answer gets the answer, not a broken connection."""
    assert status == page.put(path, b"x" * (64 << 20), Connection="close", **headers).status


def test_an_upload_that_breaks_off_leaves_nothing(
    page: Page, made: RunLayout, caplog: pytest.LogCaptureFixture
) -> None:
    """While a file is sent it lies next to the inbox's files as .part; when its sender goes away it is gone, and
    nothing is printed where the page was started.
    """
    head = f"PUT /api/inbox/half.jsonl HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n"
    with socket.create_connection(("127.0.0.1", page.port)) as sender:
        sender.sendall(f"{head}Content-Length: 9000000\r\n\r\n".encode() + b"x" * (5 << 20))
        while not files_in(made):
            pass
        (name,) = files_in(made)
        assert name.endswith(".part")
    while files_in(made):
        pass
    assert 200 == page.ask("GET", "/api/status", headers=page.bearer).status
    assert [] == caplog.records


@pytest.mark.parametrize(
    ("lie", "body"),
    [
        ("Content-Length: -1", b"{}"), ("Content-Length: 1e3", b"{}"), ("Content-Length : 2", b"{}"),
        (f"Content-Length: {'9' * 30}", b"{}"), (f"Content-Length: {'9' * 5000}", b"{}"),
        ("Transfer-Encoding: chunked", b"ffffffffffffffffffffff\r\n{}"),
        ("Transfer-Encoding: chunked", b"-2\r\n{}\r\n"), ("Transfer-Encoding: gzip", b"{}"),
        ("Content-Length: 2\r\nContent-Length: 3", b"{}"),
    ],
)  # fmt: skip
def test_a_length_that_makes_no_sense_puts_nothing_into_the_inbox(
    page: Page, made: RunLayout, lie: str, body: bytes
) -> None:
    """Lies about the size of an upload are refused, and its bytes are never taken for another request."""
    head = f"PUT /api/inbox/lie.jsonl HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n{lie}"
    follows = f"POST /api/pause HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n\r\n"
    answer = page.raw(f"{head}\r\n\r\n".encode() + body + follows.encode())
    assert (b"HTTP/1.1", True) == (answer[:8], answer.split(b" ")[1] in (b"400", b"501", b"507"))
    while found := files_in(made):  # a partial file may come late, and goes when the server sees that nobody sends
        assert all(name.endswith(".part") for name in found)
    assert "idle" == page.get("/api/status")["state"]


def test_an_upload_is_as_long_as_it_says(page: Page, made: RunLayout) -> None:
    """What comes after the announced bytes belongs to no file."""
    head = f"PUT /api/inbox/short.jsonl HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {page.key.token}\r\n"
    answer = page.raw(f"{head}Content-Length: 2\r\n\r\n".encode() + b"{}" + b"x" * 10_000)
    assert (b"201", b"{}") == (answer.split(b" ")[1], (made.inbox / "short.jsonl").read_bytes())
    (made.inbox / "short.jsonl").unlink()


def test_parts_of_a_dead_page_are_removed(tmp_path: Path) -> None:
    """What a killed page left is removed by the next; what others keep in the inbox is theirs."""
    for name in ("upload-0123456789abcdef.part", "upload-mine.part", "other.part"):
        (tmp_path / name).write_text("x")
    remove_dead_parts(tmp_path)
    assert ["other.part", "upload-mine.part"] == sorted(path.name for path in tmp_path.iterdir())
    assert "a.jsonl" == require_name("a.jsonl")


# who holds connections


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


# who may look and act


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


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's commands use curl")
def test_the_commands_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/page.md tells programs to do works as written."""
    (block,) = blocks_for("test_page_api", DOCS / "page.md")
    layout = made_up_run(tmp_path / "my-run", FILES, falling)
    program = tmp_path / "onward"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onward "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(onward_package.__file__).parents[1]))
    words = ["bash", "-e", "-c", f"{block.script()}\nwait $!"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    assert '"state": "idle"' in done.stdout
    assert '{"text": "One more row."}\n' == (layout.inbox / "rows.jsonl").read_text()
    assert not re.search("token=|Bearer", done.stderr)
