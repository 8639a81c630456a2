"""The server: one process alongside the run, at a lower priority than training, bound to the given address."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from onward.errors import UsageError
from onward.views.page.access import Key
from onward.views.page.app import PageSettings, make_app
from onward.views.page.runs import find_runs
from onward.views.page.upload import remove_dead_parts
from onward.views.web.connections import Server
from onward.views.web.listening import listen, others_can_reach, url_of
from onward.views.web.origin import Hosts, fits_header

NICENESS = 5
"""The niceness of the page: training goes first if both want a core."""
TOKEN = "ONWARD_PAGE_TOKEN"
"""The variable with a fixed token, as a service and Prometheus need; without it, each start has a new one."""
SHORTEST = 16
WAIT_SECONDS = 3
"""Seconds that open requests have to end when the page does."""


@dataclass(frozen=True)
class Address:
    """Where the page listens, and its other names.

    Args:
        host: an address or a name of this machine.
        port: 0 for any free one.
        names: names under which a proxy serves it.
    """

    host: str = "127.0.0.1"
    port: int = 0
    names: tuple[str, ...] = ()


def serve(
    directories: Sequence[Path], address: Address, show: Callable[[str], None], say: Callable[[str], None], *,
    read_only: bool = False,
) -> None:  # fmt: skip
    """Serve runs until interrupted.

    Args:
        show: receives the link with the token, once the page can be opened.
        say: receives what else the user should know.

    Raises:
        UsageError: there is no run, or the address cannot be bound.
    """
    runs = find_runs(directories)
    key = _key()
    listener = listen(address.host, address.port)
    is_public = others_can_reach(listener)
    settings = PageSettings(Hosts.of(address.host, address.names, any_address=is_public), key, read_only)
    for run in () if read_only else runs:
        with contextlib.suppress(OSError):
            remove_dead_parts(run.layout.inbox)
    if is_public:
        say("others can reach this page: whoever has its link may do what you may, and traffic is not encrypted")
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    server = PageServer(server_config(make_app(runs, settings)))
    show(f"{url_of(address.host, listener)}/?token={key.token}")
    with listener, contextlib.suppress(KeyboardInterrupt):  # this is how a page is ended
        server.run(sockets=[listener])


class PageServer(Server):
    """Ends what requests wait for before it waits for them."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the server."""
        await self.config.app.state.let_go()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def server_config(app: Starlette) -> uvicorn.Config:
    """Return uvicorn's config for the application: without logs, since addresses and headers contain the token.

    It uses h11 even if httptools is installed, because h11 bounds the size of a request's head.
    """
    return uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, date_header=False,
        timeout_graceful_shutdown=WAIT_SECONDS, http="h11", ws="none", lifespan="on",
    )  # fmt: skip


def _key() -> Key:
    token = os.environ.get(TOKEN) or None
    if token is not None and (len(token) < SHORTEST or not fits_header(token) or " " in token):
        raise UsageError(
            f"the token is too short or has characters that no header allows ({SHORTEST} at least)", where=TOKEN,
            hint=f"export {TOKEN}=$(openssl rand -hex 32)",
        )  # fmt: skip
    return Key(token)
