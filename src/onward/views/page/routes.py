"""What each address of a run answers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from onward.errors import OnwardError, UsageError
from onward.store.lookup import ALL_STATES
from onward.store.rows import FileRow
from onward.views.page import control
from onward.views.page.answers import Endpoint, json_answer, knowing, number, refusal, wanted
from onward.views.page.pages import run_page
from onward.views.page.reading import RunReader, disk_reserve
from onward.views.page.rows import RowsOfFiles
from onward.views.page.runs import NamedRun
from onward.views.page.streams import Watcher
from onward.views.page.talking import WISHED, Talker
from onward.views.page.upload import Upload, require_name
from onward.views.web.addresses import NameRoute
from onward.views.web.connections import incoming

T = TypeVar("T")
READING, ACTING = 2, 4
"""How many requests may read, and how many may wait for an owner, at the same time; others wait their turn."""
POINTS, MOST_POINTS = 1200, 4000
ROWS, MOST_ROWS = 20, 100
CONVERSATION_BYTES = 1 << 20
"""Bytes that a conversation may have: more than a model takes."""
SEND_SECONDS = 30.0
"""Seconds in which a browser has to accept an event; one that sleeps reconnects by itself."""


class RunRoutes:
    """The addresses of one run.

    Args:
        run: the run.
        home: whether there is a list of runs to go back to.
        read_only: whether the page offers nothing that changes the run.
        seconds: time between two looks at the run while a browser follows it.
    """

    def __init__(self, run: NamedRun, *, home: bool, read_only: bool, seconds: float) -> None:
        self.run = run
        self.reader = RunReader(run.layout)
        self.talker = Talker(run.layout)
        self.watcher = Watcher(self.reader, seconds=seconds)
        self._rows = RowsOfFiles(run.layout)
        self._home = home
        self._read_only = read_only
        self._reading = CapacityLimiter(READING)
        self._acting = CapacityLimiter(ACTING)

    def routes(self) -> list[BaseRoute]:
        """Return the addresses, relative to where the run is mounted."""
        look: list[tuple[str, Endpoint, tuple[str, ...]]] = [
            ("status", self.status, ()), ("history", self.history, ()), ("metrics", self.metrics, ("every",)),
            ("events", self.events, ()), ("curve", self.curve, ("points", "first", "last")),
            ("overview", self.overview, ()), ("grid", self.grid, ()),
            ("rows", self.rows, ("sha256", "position", "view", "offset", "limit")),
        ]  # fmt: skip
        act: list[tuple[str, Endpoint]] = [
            *((kind, self._asking(kind)) for kind in control.OPTIONS),
            ("chat", self.chat), ("rollback", self.rollback), ("verify", self.verify),
        ]  # fmt: skip
        return [
            Route("/", self.page, methods=["GET"]),
            *(Route(f"/api/{name}", knowing(answer, *known), methods=["GET"]) for name, answer, known in look),
            NameRoute("/api/inbox", knowing(self.upload), methods=["PUT"]),
            *(Route(f"/api/{name}", knowing(answer), methods=["POST"]) for name, answer in act),
        ]

    async def page(self, _: Request) -> Response:
        """Answer with the page of the run."""
        return run_page(self.run.title, home=self._home, read_only=self._read_only)

    async def status(self, _: Request) -> Response:
        """Answer with what `onward status --json` prints."""
        return json_answer(await self._read(self.reader.status))

    async def history(self, _: Request) -> Response:
        """Answer with what `onward history --json` prints."""
        return json_answer(await self._read(self.reader.history))

    async def metrics(self, request: Request) -> Response:
        """Answer with the step records as columns; `every` thins them."""
        every = number(request, "every", least=1)
        return json_answer(await self._read(lambda: self.reader.metrics(every)))

    async def curve(self, request: Request) -> Response:
        """Answer with the curve as it is drawn."""
        points = number(request, "points", least=10, most=MOST_POINTS) or POINTS
        first, last = number(request, "first"), number(request, "last")
        return json_answer(await self._read(lambda: self.reader.curve(points, first, last)))

    async def overview(self, _: Request) -> Response:
        """Answer with what is shown around the curve."""
        return json_answer(await self._read(self.reader.overview))

    async def grid(self, _: Request) -> Response:
        """Answer with what `onward grid --json` prints."""
        return json_answer(await self._read(self.reader.grid))

    async def events(self, request: Request) -> Response:
        """Answer with what happens from now on, as server-sent events, or with what has happened so far, as JSON."""
        accepted = request.headers.get("accept", "*/*")
        if "application/json" in accepted and "text/event-stream" not in accepted:
            return json_answer(await self._read(self.reader.log))
        if request.method == "HEAD":  # whose answer ends with its head
            return Response(media_type="text/event-stream")
        if self.watcher.is_full:
            return refusal(503, "too many browsers follow this run", "Close some of them.")
        return EventSourceResponse(self.watcher.follow(), send_timeout=SEND_SECONDS)

    async def rows(self, request: Request) -> Response:
        """Answer with rows of a file, which is named by its hash and, if it has one, its position."""
        view = request.query_params.get("view", "all")
        offset = number(request, "offset") or 0
        limit = number(request, "limit", least=1, most=MOST_ROWS) or ROWS
        sha256, position = request.query_params.get("sha256", ""), number(request, "position")

        def page() -> dict[str, Any]:
            with self.reader.ledger() as ledger:
                found = [row for row in ledger.with_content(sha256) if row.state in ALL_STATES and row.copy]
                return self._rows.page(ledger, _one(found, position), view, offset, limit)

        return json_answer(await self._read(page))

    async def upload(self, request: Request) -> Response:
        """Receive a whole file into the inbox."""
        name = require_name(request.path_params["name"])
        if "content-range" in request.headers:  # as curl sends it to go on with an upload: the rest is no file
            raise UsageError("a part of a file cannot be sent", where="Content-Range", hint="Send the whole file.")
        length = request.headers.get("content-length", "")
        size = int(length) if length.isascii() and length.isdecimal() else None
        reserve = await self._read(lambda: disk_reserve(self.reader))
        upload = Upload(self.run.layout.inbox, name, reserve)
        return json_answer({"name": name, "bytes": await upload.receive(incoming(request.stream()), size)}, 201)

    async def chat(self, request: Request) -> Response:
        """Answer a message with a state of the run: lines of JSON, with pieces of text and finally the outcome."""
        pieces = self.talker.ask(await wanted(request, WISHED, CONVERSATION_BYTES))
        first = await anext(pieces)  # an invalid wish is refused before anything is answered

        async def lines() -> AsyncGenerator[str]:
            yield json.dumps(first) + "\n"
            try:
                async for piece in pieces:
                    yield json.dumps(piece) + "\n"
            except OnwardError as error:
                yield json.dumps({"error": str(error)}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def rollback(self, request: Request) -> Response:
        """Go back to a restore point."""
        what = await wanted(request, control.ROLLBACK)
        return json_answer(await self._act(lambda: control.rollback(self.run.layout, what)))

    async def verify(self, request: Request) -> Response:
        """Check the run's proof."""
        await wanted(request, ())
        return json_answer(await self._act(lambda: control.verify(self.run.layout)))

    def _asking(self, kind: str) -> Endpoint:
        async def answer(request: Request) -> Response:
            what = await wanted(request, control.OPTIONS[kind])
            return json_answer(await self._act(lambda: control.ask(self.run.layout, kind, what)))

        return answer

    async def _read(self, call: Callable[[], T]) -> T:
        return await to_thread.run_sync(call, limiter=self._reading)

    async def _act(self, call: Callable[[], T]) -> T:
        return await to_thread.run_sync(call, limiter=self._acting)


def _one(found: list[FileRow], position: int | None) -> FileRow:
    """Return the file that is meant: the one at the position, else the newest with this content.

    A waiting file has its position only in the history: the place that it gets if nothing is put before it.
    """
    at = [row for row in found if position is None or row.position in (position, None)]
    at.sort(key=lambda row: row.position is not None)
    if not at:
        raise UsageError("there is no such file", where="sha256", hint="onward history --json has the hashes.")
    return at[-1]
