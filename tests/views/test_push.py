"""An export reaches a server that speaks the hub's interface; the token goes into its header and nowhere else."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commands import assert_refused, onward
from documented import DOCS, blocks_for, prepare

TOKEN = "hf_secretOfThisTest"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files needs."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Make a repository, say how files are to come, take a commit."""
        body = self._body()
        state: Any = self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            state.made = json.loads(body)
            self._send(200, {"url": f"{state.url}/me/model", "id": "me/model"})
        elif self.path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._send(200, {"files": files})
        else:
            state.files = _files(body)
            self._send(200, {"success": True, "commitOid": "a" * 40, "commitUrl": f"{state.url}/me/model/commit/aaa"})

    def do_GET(self) -> None:
        """List the files of the repository; nothing else can be read."""
        state: Any = self.server
        if "/tree/" in self.path and state.there:
            self._send(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in state.there])
        else:
            self._send(404, {"error": "not found"})

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, values: Any) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _files(body: bytes) -> dict[str, bytes]:
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


@pytest.fixture
def hub() -> Iterator[Any]:
    """A server on this machine, which the environment names as the hub."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.made = f"http://127.0.0.1:{server.server_address[1]}", {}, {}
    server.there = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    before = {name: os.environ.get(name) for name in ("HF_ENDPOINT", "HF_TOKEN")}
    os.environ |= {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN}
    try:
        yield server
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_export_is_uploaded(hub: Any, stream: Path) -> None:
    """All its files arrive as they are exported, in one commit; the repository is made as asked."""
    outcome = onward("push", "me/model", "--private", "--run", stream, "--json")
    assert 0 == outcome.status, outcome.err
    assert ("model", True) == (hub.made["name"], hub.made.get("private", hub.made.get("visibility") == "private"))
    assert set(outcome.json["files"]) == set(hub.files)
    assert outcome.json["files"] == {name: len(data) for name, data in hub.files.items()}
    assert "me/model" == outcome.json["repository"]
    everything = outcome.out + outcome.err + "".join(data.decode(errors="replace") for data in hub.files.values())
    assert TOKEN not in everything
    assert [] == list((stream / "cache" / "reading").iterdir())


def test_the_command_of_the_documentation_runs(
    hub: Any, stream: Path, program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/export.md says brings a run to a hub does so as written."""
    prepare(program, model, tmp_path, monkeypatch)
    monkeypatch.delenv("HF_HUB_OFFLINE")  # the hub is on this machine
    (tmp_path / "my-run").symlink_to(stream)
    (block,) = blocks_for("test_push", DOCS / "export.md")
    block.run()
    assert ("NAME", True) == (hub.made["name"], "adapter_model.safetensors" in hub.files)


def test_what_would_be_loaded_in_place_of_a_push_is_not_left_beside_it(hub: Any, stream: Path) -> None:
    """A repository with an adapter takes no whole model, and the other way round; it takes a newer adapter."""
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    hub.there = [*adapter, "README.md", "original/model.safetensors"]
    refused = onward("push", "me/model", "--format", "merged", "--run", stream)
    assert_refused(refused, 2, ", ".join(adapter), f"hf repos delete-files me/model {' '.join(adapter)}")
    assert {} == hub.files
    assert 0 == onward("push", "me/model", "--run", stream).status
    hub.there, hub.files = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"], {}
    assert_refused(onward("push", "me/model", "--run", stream), 2, "another model")
    assert {} == hub.files


def test_a_push_that_fails_is_one_line(hub: Any, stream: Path) -> None:
    """With the way to log in, where a token is wrong, of which nothing is shown; a hub that is not there is one too."""
    os.environ["HF_TOKEN"] = "hf_another"
    outcome = onward("push", "me/model", "--run", stream)
    assert_refused(outcome, 1, "the hub refuses", "Invalid credentials", "hf auth login")
    assert "hf_another" not in outcome.err
    assert_refused(onward("push", "no such/na me", "--run", stream), 2, "OWNER/NAME")
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:1"
    assert_refused(onward("push", "me/model", "--run", stream), 1, "the upload failed", "Check the network")
    assert {} == hub.files
