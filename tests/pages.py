"""A page served in a thread of the test, and requests to it as a browser or an attacker would make them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.views.page.access import Key
from onward.views.page.app import PageSettings, make_app
from onward.views.page.runs import find_runs
from onward.views.page.serving import PageServer, server_config
from onward.views.web.origin import Hosts


@dataclass(frozen=True)
class Answer:
    """What a page answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Page:
    """A page that listens at a port of this machine."""

    port: int
    key: Key

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key.token}"}

    @property
    def cookie(self) -> dict[str, str]:
        return {"Cookie": f"onward_page_{self.port}={self.key.cookie}"}

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Make a request with just these headers; a body that is no bytes goes in chunks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, dict(headers or {}), encode_chunked=False)
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Return the JSON of an address, with the token."""
        answer = self.ask("GET", path, headers=self.bearer)
        assert 200 == answer.status, answer.body
        return answer.json

    def post(self, path: str, value: Any = None) -> Answer:
        """Ask for something, with the token."""
        return self.ask("POST", path, json.dumps(value or {}).encode(), self.bearer)

    def put(self, path: str, body: Any, **headers: str) -> Answer:
        """Send a file, with the token."""
        return self.ask("PUT", path, body, {**self.bearer, **headers})

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are and return the beginning of the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            connection.sendall(data)
            return connection.recv(65536)

    @contextmanager
    def events(self) -> Iterator[Iterator[tuple[str, Any]]]:
        """Follow the server-sent events: name and value of each."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("GET", "/api/events", headers=self.bearer)
            response = connection.getresponse()
            assert "text/event-stream" in str(response.getheader("content-type"))
            yield _events(response)
        finally:
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    name = ""
    while line := response.readline().decode():  # "" is the end of the answer
        line = line.rstrip("\r\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@contextmanager
def serve(
    directories: Sequence[Path], *, read_only: bool = False, names: Sequence[str] = (), head_seconds: float = 30.0
) -> Iterator[Page]:
    """Serve runs at a free port until the end of the block."""
    settings = PageSettings(Hosts.of("127.0.0.1", names), Key(), read_only, seconds=0.05)
    server = PageServer(server_config(make_app(find_runs(directories), settings)), head_seconds=head_seconds)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield Page(listener.getsockname()[1], settings.key)
        server.should_exit = True
        thread.join(30)
