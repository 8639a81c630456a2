"""When a server ends connections, by messages and signals as they come."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
import traceback
from asyncio import constants
from collections.abc import Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")

import uvicorn

from onward.views.web.connections import MOST_QUIET, ReadToEnd, Server
from onward.views.web.listening import listen

Message = MutableMapping[str, Any]


class Spent(socket.socket):
    """A listening socket of a process that can open no more files until a connection was asked for three times."""

    asked = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """Take a connection, or fail."""
        type(self).asked += 1
        if self.asked <= 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


START: Message = {"type": "http.response.start", "status": 400, "headers": []}
BODIES = {"content-length": "6"}, {"transfer-encoding": "chunked"}, {"content-length": "6", "expect": "something"}
NONE = {}, {"content-length": "0"}, {"content-length": "6", "expect": "100-Continue"}


def pieces(count: int) -> Iterator[Message]:
    """The body of a request in pieces."""
    yield from ({"type": "http.request", "body": b"ab", "more_body": True} for _ in range(count - 1))
    yield {"type": "http.request", "body": b"ab"}


def happened(headers: dict[str, str], count: int, read: int, *answer: Message) -> list[Any]:
    """Return what happens, in order, if an application reads so many pieces of a body and answers."""
    found: list[Any] = []
    coming = pieces(count)

    async def receive() -> Message:
        found.append("read")
        return next(coming)

    async def send(message: Message) -> None:
        found.append(dict(message))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(read):
            await receive()
        for message in answer:
            await send(message)

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(ReadToEnd(app)(scope, receive, send))
    return found


def body(text: bytes, *, more: bool) -> Message:
    """A piece of an answer."""
    return {"type": "http.response.body", "body": text, "more_body": more}


END: Message = {"type": "http.response.body"}


@pytest.mark.parametrize("headers", BODIES)
@pytest.mark.parametrize("read", [0, 1, 2])
def test_an_answer_ends_when_its_request_has_come(headers: dict[str, str], read: int) -> None:
    """All of it is sent at once; only its end is held back until the rest of the request was read."""
    answer = (START, body(b"x", more=True), body(b"y", more=False))
    told = [START, body(b"x", more=True), body(b"y", more=True)]
    assert ["read"] * read + told + ["read"] * (3 - read) + [END] == happened(headers, 3, read, *answer)
    assert ["read"] * read + [START, body(b"", more=True)] + ["read"] * (3 - read) + [END] == happened(
        headers, 3, read, START, {**END, "body": b""}
    )


@pytest.mark.parametrize("headers", BODIES)
def test_an_answer_to_all_of_a_request_is_as_it_is(headers: dict[str, str]) -> None:
    """Nothing more is read, and nothing is sent twice."""
    answer = (START, body(b"x", more=True), body(b"y", more=False))
    assert ["read"] * 3 + list(answer) == happened(headers, 3, 3, *answer)


@pytest.mark.parametrize("headers", NONE)
def test_what_is_not_sent_unasked_is_not_waited_for(headers: dict[str, str]) -> None:
    """A request without a body, and one whose sender waits to be told that it may come."""
    answer = (START, body(b"y", more=False))
    assert list(answer) == happened(headers, 1, 0, *answer)


def test_what_is_no_request_passes() -> None:
    """The server's start and end have no headers."""
    came: list[str] = []

    async def app(scope: Any, *_: Any) -> None:
        came.append(scope["type"])

    nothing: Any = None
    asyncio.run(ReadToEnd(app)({"type": "lifespan"}, nothing, nothing))
    assert ["lifespan"] == came


class Connection:
    """A connection, with the request that is or was answered on it, and what became of it."""

    def __init__(self, *, answered: bool | None) -> None:
        self.cycle: Any = None if answered is None else SimpleNamespace(response_complete=answered)
        self.ended: list[str] = []
        self.transport = SimpleNamespace(
            close=lambda: self.ended.append("close"), abort=lambda: self.ended.append("abort")
        )


def test_a_connection_waits_so_long_for_a_request() -> None:
    """From its beginning, or from its last answer, but not while one is being given; the deaf are cut off later."""
    now = 0.0
    server = Server(uvicorn.Config(lambda: None, log_config=None), head_seconds=10.0, clock=lambda: now)
    new, after, during, busy = (Connection(answered=each) for each in (None, True, False, True))
    server.server_state.connections = {new, after, during, busy}  # type: ignore[arg-type]
    seen: list[tuple[float, list[list[str]]]] = []
    for now in (0.0, 10.0, 10.5, 20.0, 20.5):
        if now == 10.0:
            busy.cycle = SimpleNamespace(response_complete=True)  # another request, and its answer
        asyncio.run(server.on_tick(1))
        seen.append((now, [list(each.ended) for each in (new, after, during, busy)]))
    nothing, closed = [[], [], [], []], [["close"], ["close"], [], []]
    later = ["close", "close"]
    assert [
        (0.0, nothing), (10.0, nothing), (10.5, closed), (20.0, [later, later, [], []]),
        (20.5, [[*later, "abort"], [*later, "abort"], [], ["close"]]),
    ] == seen  # fmt: skip


def test_of_too_many_that_wait_the_oldest_go() -> None:
    """Each that is one too many ends the one that has waited longest."""
    now = 0
    server = Server(uvicorn.Config(lambda: None, log_config=None), head_seconds=1e9, clock=lambda: now)
    waiting: list[Connection] = []
    for now in range(MOST_QUIET + 3):
        waiting.append(Connection(answered=None))
        server.server_state.connections = set(waiting)  # type: ignore[arg-type]
        asyncio.run(server.on_tick(1))
        ended = [each for each in waiting if each.ended]
        assert waiting[: len(ended)] == ended
        assert max(0, now + 1 - MOST_QUIET) == len(ended)


@pytest.fixture
def server() -> Server:
    """A server that listens nowhere."""
    return Server(uvicorn.Config(lambda: None, log_config=None))


def test_every_signal_that_ends_a_command_ends_a_server(server: Server) -> None:
    """While it runs, those that were handled are its own; what was ignored, or nobody's, stays that."""
    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)

    def mine(*_: object) -> None: ...

    before = [signal.signal(number, way) for number, way in zip(numbers, (mine, mine, signal.SIG_IGN), strict=True)]
    try:
        with server.capture_signals():
            assert [server.handle_exit, server.handle_exit, signal.SIG_IGN] == [*map(signal.getsignal, numbers)]
        assert [mine, mine, signal.SIG_IGN] == [*map(signal.getsignal, numbers)]
        found: list[Any] = []

        def elsewhere() -> None:
            with server.capture_signals():
                found.extend(map(signal.getsignal, numbers))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert [mine, mine, signal.SIG_IGN] == found
    finally:
        for number, way in zip(numbers, before, strict=True):
            signal.signal(number, way)


def test_what_the_end_cuts_off_is_no_trouble(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Errors are printed, but not that answers, or the application itself, ended with the server."""
    log = logging.getLogger("uvicorn.error")
    log.error("trouble")
    log.error("Cancel 3 running task(s), timeout graceful shutdown exceeded")
    for error in (asyncio.CancelledError(), ValueError("x")):
        try:
            raise error
        except (asyncio.CancelledError, ValueError):
            log.exception("Exception in ASGI application")
            log.error(traceback.format_exc())
    assert ["trouble", "Exception in ASGI application", "ValueError: x"] == [
        record.message.splitlines()[-1] for record in caplog.records
    ]
    assert server.should_exit is False


def test_a_server_that_starts_again_has_its_port_at_once() -> None:
    """Whoever connects before the first answer waits in line; a port whose connections just ended is free."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()) as client:
        served, _ = listening.accept()
        served.close()  # who closes first keeps the port for a while
        assert b"" == client.recv(1)
        port = listening.getsockname()[1]
    with listen("127.0.0.1", port) as again:
        assert port == again.getsockname()[1]


def test_where_no_more_files_can_be_opened_connections_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once, in a line, the server tries again once for each wait, and answers when it can."""
    monkeypatch.setattr(constants, "ACCEPT_RETRY_DELAY", 0.01)

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({**START, "status": 204})
        await send(END)

    server = Server(uvicorn.Config(app, log_config=None, lifespan="off", http="h11", ws="none"))
    with Spent() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        with socket.create_connection(listening.getsockname(), timeout=60) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP/1.1 204 No Content" == client.recv(1024).splitlines()[0]
        server.should_exit = True
        thread.join(60)
    assert 4 == Spent.asked
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("connections have to wait: Too many open files.")
