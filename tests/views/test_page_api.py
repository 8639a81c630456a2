"""What the page's addresses answer: figures, events, rows, and why a query is refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import onward
from documented import DOCS, blocks_for
from faults import copy_run
from ledgers import add_file, made_up_run

import onward as onward_package
from onward.layout import RunLayout
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord

pytest.importorskip("uvicorn")
pytest.importorskip("sse_starlette")
from page_runs import FILES, HOSTILE, falling
from pages import Page, serve

from onward.views.page.reading import RunReader
from onward.views.page.rows import RowsOfFiles
from onward.views.page.streams import Seen, Watcher


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
            new = add_file(ledger, "new.jsonl", state="queued")
        assert ("changed", ["history", "overview"]) == next(event for event in events if event[0] != "status")
        with Ledger(layout.ledger) as ledger:
            ledger.set_file(new, state="training", position=3, start_step=101, planned_steps=5)  # no longer waits
        assert ("changed", ["history", "overview"]) == next(event for event in events if event[0] != "status")
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
