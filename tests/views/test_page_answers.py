"""The parts of a page that are functions of what they are given: answers, numbers, bodies, metrics, names of runs."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import threading
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest

pytest.importorskip("starlette")
pytest.importorskip("sse_starlette")

from ledgers import made_up_run
from pages import serve
from starlette.requests import Request

from onward import errors
from onward.errors import OnwardError, UsageError
from onward.layout import RunLayout
from onward.service.shown import DOING
from onward.views.page import control
from onward.views.page.access import Key
from onward.views.page.answers import BODY_BYTES, as_json, machine_error, number, onward_error, wanted
from onward.views.page.middleware import RequireAccess
from onward.views.page.prometheus import GAUGES, exposition
from onward.views.page.reading import RunReader
from onward.views.page.runs import find_runs
from onward.views.page.warming import Warming
from onward.views.web.origin import Hosts


def request(query: str = "", body: bytes = b"") -> Request:
    """Return a request."""
    coming = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(coming)

    return Request({"type": "http", "method": "POST", "query_string": query.encode(), "headers": []}, receive)


def test_numbers_that_json_lacks_become_null() -> None:
    """A loss that is not finite leaves all others as they are, however deep it lies."""
    value = {"loss": [1.5, math.nan, math.inf], "steps": ((1, -math.inf), {"a": [math.nan]}), "name": "x", "ok": True}
    expected = {"loss": [1.5, None, None], "steps": [[1, None], {"a": [None]}], "name": "x", "ok": True}
    assert expected == json.loads(as_json(value), parse_constant=lambda name: pytest.fail(name))
    assert '{"a": 1.5}' == as_json({"a": 1.5})


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.FileRejected, 422), (errors.RunLocked, 409), (errors.NotMadeHere, 409), (errors.NoSpace, 507),
        (UsageError, 400), (errors.ModelError, 500), (errors.DamagedState, 500),
    ],
)  # fmt: skip
def test_an_error_has_the_status_of_its_kind(error: type[OnwardError], status: int) -> None:
    """What the sender can mend is told from what fails here; the words are those of the command line."""
    one = error("wrong", where="here", hint="mend it")
    answer = asyncio.run(onward_error(request(), one))
    assert (status, one.to_dict()) == (answer.status_code, json.loads(bytes(answer.body)))


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
@pytest.mark.parametrize(("kind", "name"), [("rollback", "to"), ("skip", "file"), ("skip", "reason")])
def test_what_is_no_text_is_refused(kind: str, name: str, text: str, tmp_path: Path) -> None:
    """JSON has it, but neither a command line nor a ledger does: the key is blamed."""
    layout = made_up_run(tmp_path / "run", [], float)
    with pytest.raises(UsageError, match=f"{name} contains something that is not a character"):
        control.rollback(layout, {name: text}) if kind == "rollback" else control.ask(layout, kind, {name: text})


def test_an_error_that_nobody_foresaw_looks_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks gets JSON that says where to look, and nothing of the code."""
    layout = made_up_run(tmp_path / "run", [], float)
    monkeypatch.setattr(RunReader, "status", lambda _: 1 / 0)
    with serve([layout.root]) as page:
        answer = page.ask("GET", "/api/status", headers=page.bearer)
    assert (500, "the page failed; its own output says why") == (answer.status, answer.json["error"])
    assert {"error", "where", "hint"} == answer.json.keys()


def test_a_machine_that_fails_is_said_to_be_busy() -> None:
    """It may be asked again, and what is shown can be printed; an error without words is called by its name."""
    failures = OSError(5, "Input/output error", "a\x1b[2J"), OSError()
    for error in (sqlite3.OperationalError("no such table: a\x1b[2J"), *failures):
        answer = asyncio.run(machine_error(request(), error))
        told = json.loads(bytes(answer.body))
        assert told["error"]
        assert (503, True, True) == (answer.status_code, "doctor" in told["hint"], told["error"].isprintable())


def test_a_folder_that_cannot_be_read_is_the_machine_s_failure(tmp_path: Path) -> None:
    """What lies around it is answered as ever."""
    layout = made_up_run(tmp_path / "run", [], float)
    layout.inbox.rmdir()
    layout.inbox.symlink_to(layout.inbox)  # nothing at this name can be opened
    with serve([layout.root]) as page:
        answer = page.ask("GET", "/api/overview", headers=page.bearer)
        assert (503, True) == (answer.status, "Too many levels of symbolic links" in answer.json["error"])
        assert "idle" == page.get("/api/status")["state"]


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """A browser that waits for it is told so, and how it may take longer."""
    with pytest.raises(OnwardError, match="the command was ended after 0 s") as refused:
        control.verify(RunLayout(tmp_path), seconds=0.01)
    assert f"onward verify --run {tmp_path}" in str(refused.value.hint)


@pytest.mark.parametrize("text", ["-1", "2", "1.5", "x", "1e3", "٣", "²", "0x10", "1" * 20, " 3", "+4", "1_0"])
def test_a_number_is_written_in_digits_and_not_too_small(text: str) -> None:
    """Anything else is refused by the name of the key."""
    with pytest.raises(UsageError) as refused:
        number(request(f"every={quote(text)}"), "every", least=3)
    assert ("every", True) == (refused.value.where, refused.value.what.startswith("every must be a number from 3 up"))


def test_numbers() -> None:
    """The least is taken, more than the most becomes the most, and what is not there is none."""
    asked = [number(request(f"every={text}"), "every", least=3, most=9) for text in ("3", "009", "10", "9" * 19, "")]
    assert [3, 9, 9, 9, None] == asked
    assert None is number(request("other=1"), "every")


def test_a_body_is_an_object_with_known_keys() -> None:
    """What is none is refused, and so is what would be ignored, and what is too large; nothing at all is empty."""

    def read(body: bytes) -> Any:
        return asyncio.run(wanted(request(body=body), ("to", "requeue")))

    assert [{}, {}, {"to": "x"}, {"requeue": 1}] == [
        read(body) for body in (b"", b" \n", b'{"to": "x"}', b'{"requeue": 1}'.ljust(BODY_BYTES))
    ]
    for body, where, words in (
        (b"x", "body", "not JSON"), (b"\xff", "body", "not JSON"), (b"[" * 50_000, "body", "not JSON"),
        (b"[]", "body", "a JSON object"), (b"null", "body", "a JSON object"), (b'"x"', "body", "a JSON object"),
        (b"{}".ljust(BODY_BYTES + 1), "body", f"more than {BODY_BYTES} bytes"), (b'{"To": 1}', "To", "by this name"),
        (b'{"to\\u001b": 1}', r"to\x1b", "by this name"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as refused:
            read(body)
        assert (where, True) == (refused.value.where, words in refused.value.what)


def test_metrics_are_in_prometheus_text_format() -> None:
    """Each family has its help and type once; a value that is missing is left out; labels are escaped."""
    values: dict[str, Any] = dict.fromkeys(GAUGES)
    first, second, *_ = DOING
    statuses = {
        'a"b\\c\nd': {**values, "loss": 1.5, "queue": 0, "state": first, "problem": None},
        "e": {**values, "queue": 3, "state": second, "problem": "x"},
    }
    name = r"a\"b\\c\nd"
    states = [
        f'onward_state{{run="{run}",state="{state}"}} {float(state == is_in)!r}'
        for run, is_in in ((name, first), ("e", second))
        for state in DOING
    ]
    assert [
        "# HELP onward_queue_files Files that wait in the queue.",
        "# TYPE onward_queue_files gauge",
        f'onward_queue_files{{run="{name}"}} 0.0',
        'onward_queue_files{run="e"} 3.0',
        "# HELP onward_loss Loss of the newest step, the mean over its target tokens.",
        "# TYPE onward_loss gauge",
        f'onward_loss{{run="{name}"}} 1.5',
        "# HELP onward_state 1 for the state that the run is in.",
        "# TYPE onward_state gauge",
        *states,
        "# HELP onward_problem 1 if something keeps the run from going on.",
        "# TYPE onward_problem gauge",
        f'onward_problem{{run="{name}"}} 0.0',
        'onward_problem{run="e"} 1.0',
        "# HELP onward_files Files by state.",
        "# TYPE onward_files gauge",
        'onward_files{run="e",state="done"} 2.0',
    ] == exposition(statuses, {"e": {"done": 2}}).splitlines()
    assert exposition(statuses, {}).endswith("\n")


def test_every_run_has_a_name_of_its_own(tmp_path: Path) -> None:
    """Whatever directories are called, addresses are plain and differ, also where one is called like a second."""
    names = ["x", "x-2", "...", "-", "ü", "a b", "a_b.c"]
    for place, name in enumerate([*names, "x"]):
        (tmp_path / str(place)).mkdir()
        made_up_run(tmp_path / str(place) / name, [], float)
    found = find_runs([tmp_path / str(place) for place in range(len(names) + 1)])
    assert ["x", "x-2", "run", "run-2", "run-3", "a-b", "a_b.c", "x-3"] == [run.name for run in found]
    assert [*names, "x"] == [run.title for run in found]


def test_runs_are_found_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run once, however it is reached; in a folder of runs, those; what is neither is refused."""
    run = made_up_run(tmp_path / "a\x1b", [], float).root
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    (found,) = find_runs([Path(), run, tmp_path / "link", tmp_path])
    assert r"a\x1b" == found.title
    for place in ("empty", "gone", "file"):
        with pytest.raises(UsageError, match="no run in this directory"):
            find_runs([run, tmp_path / place])


def test_long_runs_are_added_up_when_the_page_starts() -> None:
    """Each in its turn, whatever one of them fails at, until the page ends."""
    warmed: list[int] = []
    gone = threading.Event()

    class Reader:
        def __init__(self, place: int) -> None:
            self.place = place

        def warm(self) -> None:
            warmed.append(self.place)
            if self.place == 3:
                warming.end()
                gone.set()
            raise (OSError, sqlite3.OperationalError, UsageError, OSError)[self.place]("unreadable")

    warming = Warming([cast(RunReader, Reader(place)) for place in (0, 1, 2, 3, 0)])
    warming.start()
    assert gone.wait(60)
    for thread in threading.enumerate():
        if thread.name == "onward-page-warming":
            thread.join()
    assert [0, 1, 2, 3] == warmed


@pytest.mark.parametrize(("kind", "passed"), [("lifespan", True), ("websocket", False)])
def test_only_what_is_checked_reaches_a_run(kind: str, passed: bool) -> None:
    """The server's start and end do; a kind of request that nothing here answers does not."""
    came: list[str] = []

    async def app(scope: Any, *_: Any) -> None:
        came.append(scope["type"])

    access = RequireAccess(app, Key(), Hosts.of("127.0.0.1"), read_only=False)
    asyncio.run(access({"type": kind}, cast(Any, None), cast(Any, None)))
    assert ([kind] if passed else []) == came


def test_runs_of_a_folder_come_as_people_count(tmp_path: Path) -> None:
    """The second run comes before the tenth; runs that are named one by one keep their order."""
    for name in ("run-10", "run-2", "a", "²"):
        made_up_run(tmp_path / name, [("a.jsonl", 1)], float)
    assert ["a", "run-2", "run-10", "²"] == [run.title for run in find_runs([tmp_path])]
    assert ["run-10", "a"] == [run.title for run in find_runs([tmp_path / "run-10", tmp_path / "a"])]
