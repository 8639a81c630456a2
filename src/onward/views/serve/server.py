"""A server for one run: the socket, the model, and switching to the newest commit while requests are answered."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette

from onward.errors import OnwardError, Unreadable, UsageError
from onward.layout import RunLayout
from onward.service.holder import is_held
from onward.text import storable
from onward.views.chat.engine import Engine
from onward.views.loaded import load
from onward.views.points import hold, state_mark
from onward.views.serve.app import Service
from onward.views.web.connections import Server
from onward.views.web.listening import listen, others_can_reach, url_of
from onward.views.web.origin import Hosts, fits_header

KEY = "ONWARD_API_KEY"
"""The variable with the key that clients must send."""
LOOK_SECONDS = 1.0
"""Seconds between two checks for a newer commit."""
GRACE = 10
"""Seconds that current answers get when the server ends."""


@dataclass(frozen=True)
class Served:
    """What is served, and where.

    Args:
        host, port: where to listen; port 0 takes any free one.
        key: the key that clients must send, or None.
        at: the state, as `--at` names it.
        follow: whether to switch to newer commits.
    """

    host: str
    port: int
    key: str | None = None
    at: str | None = None
    follow: bool = False


def serve(
    layout: RunLayout, served: Served, *, said: Callable[[str], None], give_way: Callable[[], None],
    ready: Callable[[str], None],
) -> None:  # fmt: skip
    """Answer requests until the process is asked to end, as by Ctrl-C.

    Args:
        said: receives lines for the user.
        give_way: called while another process trains the run.
        ready: receives the base URL once requests are answered.

    Raises:
        UsageError: the port is taken, or others could reach it without a key.
        OnwardError: the state cannot be found or loaded.
    """
    host, key = served.host, served.key
    with listen(host, served.port) as listening:
        _require_key(key, listening)
        url = f"{url_of(host, listening)}/v1"
        if is_held(layout.lock):
            give_way()
        mark = state_mark(layout) if served.follow else None
        with hold(layout, served.at) as point, Engine(load(layout, point)) as engine:
            said(f"{engine.loaded.label} answers")
            name = storable(layout.root.absolute().name)
            app = Service(engine, name, key, hosts_of(host, listening)).app()
            server = _Announcing(_config(app), lambda: ready(url))
            following = Following(layout, engine, mark, said, give_way) if served.follow else contextlib.nullcontext()
            with following, contextlib.suppress(KeyboardInterrupt):  # this is how it is ended
                server.run([listening])


def _config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, http="h11", lifespan="off"
    )


def _require_key(key: str | None, listening: socket.socket) -> None:
    """Refuse to answer other machines without a key, and a key that no client could send.

    Raises:
        UsageError: they could reach the server, and there is none; or it does not fit into a header.
    """
    if key is not None and not fits_header(key):
        what = "no client could send this key: it has characters that no header carries, or a blank at an end"
        raise UsageError(what, where=KEY, hint=f"export {KEY}=$(openssl rand -hex 32)")
    if key is None and others_can_reach(listening):
        hint = f"Set {KEY}; clients then send it as their API key."
        raise UsageError("other machines could reach the model, and no key is set", where="--host", hint=hint)


class Following:
    """While its body runs, switches from the answering commit to the newest one without interrupting answers.

    What keeps the newest commit from being loaded is reported once, and the one in memory continues to answer.
    """

    def __init__(
        self,
        layout: RunLayout,
        engine: Engine,
        mark: object,
        said: Callable[[str], None],
        give_way: Callable[[], None],
    ) -> None:
        self._layout, self._engine, self._mark = layout, engine, mark
        self._said, self._give_way = said, give_way
        self._problem = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="onward-follow", daemon=True)

    def __enter__(self) -> Following:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            self.try_to_look()

    def try_to_look(self) -> None:
        """Switch to the newest commit, or say why that is impossible if it was not said before."""
        problem = ""
        try:
            self.look()
        except (OnwardError, sqlite3.Error, OSError) as error:
            problem = f"the newest commit cannot be loaded: {error}"
        if problem and problem != self._problem:
            self._said(problem)
        self._problem = problem

    def look(self) -> None:
        """Switch to the newest commit, if it is another.

        Raises:
            OnwardError: it cannot be loaded; it is not tried again.
            Unreadable, OSError, sqlite3.Error: the disk fails, or the ledger is busy; the next look tries again.
        """
        mark = state_mark(self._layout)
        if mark == self._mark:
            return
        if is_held(self._layout.lock):
            self._give_way()
        self._mark = mark
        try:
            with hold(self._layout) as point:
                self._engine.move_to(self._layout, point)
        except (Unreadable, OSError, sqlite3.Error):
            self._mark = None
            raise
        self._said(f"{self._engine.loaded.label} answers")


class _Announcing(Server):
    """A server that says when requests are answered."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        if not self.should_exit:
            self._started()


def hosts_of(host: str, listening: socket.socket) -> Hosts | None:
    """Return the names by which a server may be addressed that only this machine can reach; None for others."""
    return None if others_can_reach(listening) else Hosts.of(host)
