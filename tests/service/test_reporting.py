"""Reporting: notifications by POST, the service manager, a log that stays small; none of it can do harm."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from daemons import SETTINGS, configure, done, end, rows_file, twin_of, until, variable, watch
from ledgers import empty_run
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.config import NotifyConfig
from onward.errors import OnwardError
from onward.layout import RunLayout
from onward.service.outside.reporting import LOG_BYTES, LOG_PARTS, Reporter
from onward.service.owner.alongside.background import Background
from onward.service.owner.alongside.heartbeat import Heartbeat
from onward.store.ledger import Ledger


class Listener(ThreadingHTTPServer):
    """A server that keeps what it receives, and answers with `status`; with None it never answers."""

    daemon_threads = True

    def __init__(self, status: int | None = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.told: list[dict[str, Any]] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/told"


class _Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told.append({"path": self.path, "type": self.headers["Content-Type"], **json.loads(body)})
        if self.server.status is None:
            self.server.ended.wait()
            return
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture
def listener() -> Generator[Listener]:
    """A server on this machine."""
    server = Listener()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run that nothing was trained in."""
    return new_run(tmp_path / "run", model, **SETTINGS)


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    """The directories and the ledger of a run without a model."""
    return empty_run(tmp_path / "run")


def unused_url() -> str:
    """Return an address on this machine where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def test_a_url_is_told_by_post(run: Run, listener: Listener) -> None:
    """A daemon posts what was done, rejected and paused as JSON, each once, and nothing that was not asked for."""
    configure(run, notify={"url": listener.url, "events": ["done", "rejected", "paused"]})
    (run.layout.inbox / "bad.jsonl").write_text("nonsense\n")
    rows_file(run.layout.inbox / "good.jsonl", 6)
    process = watch(run)
    until(lambda: done(run) == ["good.jsonl"], process)
    run.pause()
    run.resume()
    assert 0 == end(process)
    told = sorted(listener.told, key=lambda message: message["created"])
    assert ["rejected", "done", "paused"] == [message["kind"] for message in told]
    assert [("/told", "application/json", str(run.layout.root.absolute()))] * 3 == [
        (message["path"], message["type"], message["run"]) for message in told
    ]
    assert {"path", "type", "run", "kind", "level", "message", "step", "created"} == set(told[1])
    assert ("good.jsonl done: 3 steps", 3, "info") == (told[1]["message"], told[1]["step"], told[1]["level"])


@pytest.mark.parametrize("kind", ["refused", "status 500", "command fails"])
def test_who_cannot_be_told_touches_nothing(
    run: Run, model: Path, tmp_path: Path, listener: Listener, kind: str
) -> None:
    """A dead address, an error and a failing command are lines in the log; the state is that of any run."""
    listener.status = 500
    targets = {
        "refused": {"url": unused_url()},
        "status 500": {"url": listener.url},
        "command fails": {"command": "false"},
    }
    configure(run, notify={**targets[kind], "events": ["done"]})
    files = [rows_file(tmp_path / f"{n}.jsonl", n) for n in (5, 6)]
    run.add(*files)
    assert 0 == run.watch(once=True)
    assert 1 <= run.layout.log.read_text().count(f"notify.{next(iter(targets[kind]))} failed")
    assert_same_state(twin_of(run, model, files), run.layout.root)
    assert run.verify().ok


@pytest.mark.slow
def test_who_never_answers_holds_up_nobody(run: Run, tmp_path: Path, listener: Listener) -> None:
    """With an address that accepts and never answers, training goes on and a stop waits for one attempt at most."""
    listener.status = None
    configure(run, notify={"url": listener.url, "events": ["done"]})
    run.add(*(rows_file(tmp_path / f"{n}.jsonl", n) for n in range(3, 9)))
    process = watch(run)
    until(lambda: len(done(run)) == 6, process)
    before = len(listener.told)
    assert 0 == end(process)
    assert 6 > before + 1 >= len(listener.told)
    assert 6 == run.layout.log.read_text().count(" done: ")


def test_what_was_due_is_told_when_the_listener_is_back(layout: RunLayout, listener: Listener) -> None:
    """After a failure that event is given up; the next ones wait for a while and are sent then, in order."""
    now = {"at": 0.0}
    listener.status = 500
    notify = NotifyConfig(url=listener.url, events=["done"])
    reporter = Reporter(layout, lambda: notify, monotonic=lambda: now["at"])
    with Ledger(layout.ledger) as ledger:
        for number in range(4):
            ledger.add_event("info", str(number), kind="done")
    reporter.report()
    reporter.report()
    assert ["0"] == [message["message"] for message in listener.told]
    listener.status = 200
    now["at"] += 60.0
    reporter.report()
    assert ["0", "1", "2", "3"] == [message["message"] for message in listener.told]
    reporter.close()


def test_a_command_may_leave_something_running(layout: RunLayout, tmp_path: Path) -> None:
    """A command is done when it ends, whatever it started in the background."""
    notify = NotifyConfig(command="sh -c 'sleep 60 & exit 0'", events=["done"])
    reporter = Reporter(layout, lambda: notify)
    with Ledger(layout.ledger) as ledger:
        ledger.add_event("info", "one", kind="done")
    begun = time.monotonic()
    reporter.report()
    reporter.close()
    assert 50.0 > time.monotonic() - begun
    assert "failed" not in layout.log.read_text()


def test_the_log_is_rotated(layout: RunLayout) -> None:
    """Whatever is written, the log and its older parts stay below their bound, each, and the newest line is there."""
    reporter = Reporter(layout, NotifyConfig)
    with Ledger(layout.ledger) as ledger:
        for number in range(12 * (LOG_PARTS + 2)):
            ledger.add_event("info", f"{number} {'x' * (LOG_BYTES // 10)}")
            if number % 10 == 0:
                reporter.report()
        ledger.add_event("info", "the last one")
    reporter.report()
    reporter.close()
    names = [layout.log.name, *(f"{layout.log.name}.{part}" for part in range(1, LOG_PARTS + 1))]
    assert sorted(names) == sorted(path.name for path in layout.log.parent.iterdir())
    assert [] == [path.name for path in layout.log.parent.iterdir() if path.stat().st_size > LOG_BYTES]
    assert layout.log.read_text().endswith("the last one\n")


def test_a_log_that_others_rotate_or_remove_goes_on(layout: RunLayout) -> None:
    """The next line begins another file, and is not lost in one that has no name any more."""
    aside = layout.log.with_name("aside")
    reporter = Reporter(layout, NotifyConfig)
    reporter.write("info", "one")
    layout.log.rename(aside)
    reporter.write("info", "two")
    layout.log.unlink()
    reporter.write("info", "three")
    reporter.close()
    assert ["one", "three"] == [path.read_text().split()[-1] for path in (aside, layout.log)]


def test_a_log_on_a_full_disk_is_no_failure(layout: RunLayout) -> None:
    """What a full disk did not take is no failure when the log is closed either."""
    layout.log.parent.mkdir(exist_ok=True)
    layout.log.symlink_to("/dev/full")
    reporter = Reporter(layout, NotifyConfig)
    reporter.write("info", "a line")
    reporter.close()


def test_a_log_that_cannot_be_written_is_no_failure(layout: RunLayout, capfd: pytest.CaptureFixture[str]) -> None:
    """Where a directory has the log's name, nothing is raised or printed, and notifications are still sent."""
    layout.log.parent.mkdir(exist_ok=True)
    layout.log.mkdir()
    reporter = Reporter(layout, NotifyConfig)
    with Ledger(layout.ledger) as ledger:
        ledger.add_event("info", "one")
    with Background([(0.1, reporter.report)]):
        time.sleep(0.3)
    reporter.close()
    assert ("", "") == tuple(capfd.readouterr())
    assert logging.raiseExceptions


@pytest.fixture
def manager(tmp_path: Path) -> Generator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(0.2)
        yield channel


def heard(manager: socket.socket) -> list[str]:
    """Read all that a manager was told so far."""
    lines: list[str] = []
    try:
        while True:
            lines.append(manager.recv(4096).decode())
    except TimeoutError:
        return lines


def test_the_service_manager_is_told(run: Run, tmp_path: Path, manager: socket.socket) -> None:
    """systemd is told that the daemon is ready, then that it is alive, and finally that it stops: sd_notify(3)."""
    process = watch(run, prepare=variable("NOTIFY_SOCKET", tmp_path / "notify"))
    lines: list[str] = []
    until(lambda: bool(lines.extend(heard(manager))) or {"READY=1", "WATCHDOG=1"} <= set(lines), process)
    assert 0 == end(process)
    lines += heard(manager)
    assert {"READY=1", "WATCHDOG=1", "STOPPING=1"} == set(lines)
    assert (1, "STOPPING=1") == (lines.count("READY=1"), [line for line in lines if line != "WATCHDOG=1"][-1])


def test_a_step_that_hangs_does_not_feed_the_watchdog(
    layout: RunLayout, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog is fed while the work moves, and not while a step hangs: then the manager ends the process.

    A ledger that cannot be written, as on a full disk, does not keep the manager from being told.
    """
    now = {"at": 0.0}
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    heart = Heartbeat(layout.ledger, monotonic=lambda: now["at"])
    heart.expect_step(1.0)
    heart.beat()
    assert ["WATCHDOG=1"] == heard(manager)
    now["at"] += 100.0
    heart.beat()
    with pytest.raises(OnwardError):
        Heartbeat(layout.root / "none").beat()
    assert ["WATCHDOG=1"] == heard(manager)


@pytest.mark.parametrize("kind", ["gone", "closed", "full"])
def test_a_manager_that_does_not_listen_is_no_failure(run: Run, tmp_path: Path, kind: str) -> None:
    """With a socket that is gone, closed or unread, files are trained and a stop is obeyed."""
    address = tmp_path / "notify"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
    ):
        channel.bind(str(address))
        if kind == "closed":
            channel.close()
        elif kind == "gone":
            address.unlink()
        else:
            sender.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sender.sendto(b"x", str(address))
        rows_file(run.layout.inbox / "a.jsonl", 4)
        process = watch(run, prepare=variable("NOTIFY_SOCKET", address))
        until(lambda: done(run) == ["a.jsonl"], process)
        assert 0 == end(process)
