"""`onward mcp`: an assistant looks at a run and adds to it over standard input and output, and can destroy nothing."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import json
import math
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
from commands import assert_refused, onward

import onward as package

HAS_MCP = importlib.util.find_spec("mcp") is not None
LOOKING, ASKING = ["grid", "history", "metrics", "status", "verify"], ["add", "pause", "resume"]
LEFT_TO_PEOPLE = {"rollback", "rebuild", "reset", "skip", "stop", "train", "adopt", "init"}


@pytest.mark.skipif(HAS_MCP, reason="mcp is installed")
def test_without_the_package_it_is_named(run: Path) -> None:
    """The refusal says which extra brings it."""
    assert_refused(onward("mcp", "--run", run), 2, "pip install 'onward[mcp]'")


WAITING = """
import os, signal, sys, threading, types

def serve(run):
    threading.Thread(target=sys.stdin.read).start()
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()

sys.modules["onward.views.assistant"] = types.SimpleNamespace(serve=serve)
from onward import cli
cli.main()
"""


def test_a_signal_ends_it_while_it_waits_for_the_assistant(run: Path) -> None:
    """The thread that reads what the assistant asks holds up no end."""
    command = [sys.executable, "-c", WAITING, "mcp", "--run", str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "ended by SIGTERM; what was committed is safe\n" == process.stderr.read()
        assert 1 == process.wait()


@pytest.mark.skipif(not HAS_MCP, reason="pip install 'onward[mcp]'")
def test_an_assistant_looks_adds_and_verifies(run: Path, tmp_path: Path) -> None:
    """The official client is offered these tools and no others; answers are those of the command line."""
    good = tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(4, 7))
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [{"question": "?"}])
    seen = asyncio.run(_talk(run, good, bad))
    assert {**dict.fromkeys(LOOKING, True), **dict.fromkeys(ASKING, False)} == seen["tools"]
    assert LEFT_TO_PEOPLE.isdisjoint(seen["tools"])
    status = onward("status", "--run", run, "--json").json
    assert status["global_step"] == seen["status"]["global_step"]
    assert 1 == len(seen["history"])
    assert onward("grid", "--run", run, "--json").json == seen["grid"]
    assert 2 == len(seen["metrics"]["step"])
    assert ["more.jsonl"] == [row["name"] for row in seen["added"]]
    assert "no known row format" in seen["refused"]
    assert "Error executing tool pause: there is no argument release\n  It takes: nothing" == seen["release"]
    assert ["more.jsonl"] == [row["name"] for row in seen["newest"]]
    assert seen["verified"]["ok"] is True
    assert "resume" in seen["paused"] or "paused" in seen["paused"]
    assert 1 == onward("status", "--run", run, "--json").json["queue"]


@pytest.mark.skipif(not HAS_MCP, reason="pip install 'onward[mcp]'")
def test_a_failing_disk_and_a_number_that_is_none_reach_the_assistant_in_words() -> None:
    """It reads what failed, not only that something did; NaN, which is not JSON, is null."""
    from onward.views.assistant import make_server

    class Failing:
        def status(self) -> dict[str, Any]:
            raise sqlite3.OperationalError("database is locked")

        def resume(self) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        def verify(self, deep: bool) -> Any:
            return types.SimpleNamespace(to_dict=lambda: {"loss": math.nan})

    server = make_server(cast(Any, Failing()))

    def told(name: str) -> str:
        with pytest.raises(Exception, match="What was committed is safe") as failed:
            asyncio.run(server.call_tool(name, {}))
        return str(failed.value).splitlines()[0]

    assert "Error executing tool status: database is locked" == told("status")
    assert "Error executing tool resume: [Errno 28] No space left on device" == told("resume")
    answer: Any = asyncio.run(server.call_tool("verify", {}))
    assert {"loss": None} == json.loads(answer.content[0].text)


async def _talk(run: Path, good: Path, bad: Path) -> dict[str, Any]:
    from mcp import Client, StdioServerParameters

    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "onward", "mcp", "--run", str(run)], env=environment
    )
    async with Client(server) as client:
        tools = (await client.list_tools()).tools

        async def call(name: str, **arguments: Any) -> Any:
            result = await client.call_tool(name, arguments)
            if result.is_error:
                return result.content[0].text
            value = result.structured_content
            return value["result"] if isinstance(value, dict) and set(value) == {"result"} else value

        seen = {
            "tools": {tool.name: bool(tool.annotations and tool.annotations.read_only_hint) for tool in tools},
            "status": await call("status"),
            "history": await call("history"),
            "metrics": await call("metrics", points=10),
            "grid": await call("grid"),
            "verified": await call("verify"),
            "added": await call("add", paths=[str(good)]),
            "refused": await call("add", paths=[str(bad)]),
            "newest": await call("history", newest=1),
            "release": await call("pause", release=True),
            "paused": await call("pause"),
            "resumed": await call("resume"),
        }
    json.dumps(seen)
    return seen
