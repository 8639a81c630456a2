"""Passes questions from browsers to the process that answers, and its answers back to those who asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from onward.errors import ModelError, UsageError
from onward.layout import RunLayout

IDLE_SECONDS = 600.0
"""Seconds without a question after which the process ends and frees its memory."""
LINE_BYTES = 16 << 20
MOST_TURNS, MOST_TOKENS = 200, 4096
RANGES = {"temperature": (0, 100), "max_tokens": (1, MOST_TOKENS), "seed": (-(2**63), 2**63 - 1)}
WISHED: dict[str, Any] = {
    "messages": list, "at": str, "system": str, "temperature": (int, float), "max_tokens": int, "seed": int
}  # fmt: skip
"""What a wish may say."""

Answer = dict[str, Any]
Askers = dict[int, asyncio.Queue[Answer | None]]
"""Those who wait for an answer from one process, by the number of the question."""
COMMAND = (sys.executable, "-P", "-m", "onward.views.page.answering")


class Talker:
    """Starts the process that answers at the first question, and ends it when there are no more questions.

    Args:
        command: starts the process; the run's directory is appended to it.
        idle: seconds without a question after which it ends.
    """

    def __init__(self, layout: RunLayout, command: Sequence[str] = COMMAND, *, idle: float = IDLE_SECONDS) -> None:
        self._layout = layout
        self._command = command
        self._idle = idle
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self._askers: Askers = {}
        self._asked = 0
        self._rest: asyncio.TimerHandle | None = None

    async def ask(self, wish: Mapping[str, Any]) -> AsyncGenerator[Answer]:
        """Yield the pieces of an answer, then its outcome.

        Raises:
            UsageError: the wish is invalid.
            ModelError: the process that answers ended.
        """
        known = require_wish(wish)
        process, askers = await self._started()
        assert process.stdin is not None
        self._asked = number = self._asked + 1
        queue: asyncio.Queue[Answer | None] = asyncio.Queue()
        askers[number] = queue
        is_open = True
        try:
            process.stdin.write(json.dumps({**known, "id": number}).encode() + b"\n")
            with contextlib.suppress(ConnectionError):  # the process has ended, of which the queue tells
                await process.stdin.drain()
            while (answer := await queue.get()) is not None:
                is_open = "text" in answer
                yield answer
                if not is_open:
                    return
            is_open = False
            raise ModelError("the process that answers has ended", hint="Ask again; onward chat says more.")
        finally:
            del askers[number]
            if is_open and process.returncode is None:  # the browser went away
                process.stdin.write(json.dumps({"cancel": number}).encode() + b"\n")
            self._rest_later()

    async def end(self) -> None:
        """End the process."""
        if self._rest is not None:
            self._rest.cancel()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reading is not None:
            await self._reading

    async def _started(self) -> tuple[asyncio.subprocess.Process, Askers]:
        """Return the process, started only once even for simultaneous questions, and those waiting for its answers."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                words = (*self._command, str(self._layout.root.absolute()))
                self._process = await asyncio.create_subprocess_exec(
                    *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=LINE_BYTES,
                    start_new_session=True,  # Ctrl-C is for the page, whose end it learns through the pipe
                )  # fmt: skip
                self._askers = {}  # those of an earlier process are told of its end
                self._reading = asyncio.create_task(self._read(self._process, self._askers))
            return self._process, self._askers

    async def _read(self, process: asyncio.subprocess.Process, askers: Askers) -> None:
        """Pass each line to the one who asked, and the end of the process to everybody; what it says must be JSON."""
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                answer = json.loads(line)
                queue = askers.get(answer.pop("id"))
                if queue is not None:
                    queue.put_nowait(answer)
        except ValueError:  # only then: to kill one that has just ended takes its status from asyncio, which complains
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()  # a question from now on starts another process
        for queue in askers.values():
            queue.put_nowait(None)

    def _rest_later(self) -> None:
        loop = asyncio.get_running_loop()
        if self._rest is not None:
            self._rest.cancel()
        self._rest = loop.call_later(self._idle, self._let_go)

    def _let_go(self) -> None:
        process = self._process
        if process is not None and process.stdin is not None and not self._askers:
            process.stdin.close()  # then it ends by itself
            self._process = None


def require_wish(wish: Mapping[str, Any]) -> dict[str, Any]:
    """Return the wish, reduced to what may be passed to the process that answers.

    Raises:
        UsageError: a part of it is not what it has to be.
    """
    messages = wish.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MOST_TURNS or not all(map(_is_message, messages)):
        raise UsageError(f"messages must be 1 to {MOST_TURNS} objects with role and content", where="messages")
    if messages[-1]["role"] != "user":
        raise UsageError("the last message must be the one to answer, with the role user", where="messages")
    known: dict[str, Any] = {name: wish[name] for name in WISHED if wish.get(name) is not None}
    for name, value in known.items():
        if isinstance(value, bool) or not isinstance(value, WISHED[name]):
            kind = "a string" if WISHED[name] is str else "a number"
            raise UsageError(f"{name} must be {kind}", where=name)
        least, most = RANGES.get(name, (None, None))
        if least is not None and not least <= value <= most:
            raise UsageError(f"{name} must be from {least} to {most}", where=name)
    return {**known, "messages": [{"role": turn["role"], "content": turn["content"]} for turn in messages]}


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in ("user", "assistant") and isinstance(turn.get("content"), str)
