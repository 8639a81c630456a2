"""The application: one run at the root, or a list of runs, each below its name."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from onward.errors import OnwardError
from onward.views.page.access import Key
from onward.views.page.answers import gone, http_error, json_answer, knowing, machine_error, onward_error, unforeseen
from onward.views.page.middleware import RequireAccess
from onward.views.page.pages import STATIC, list_page
from onward.views.page.prometheus import CONTENT_TYPE, exposition
from onward.views.page.routes import RunRoutes
from onward.views.page.runs import NamedRun
from onward.views.page.streams import SECONDS
from onward.views.page.warming import Warming
from onward.views.web.connections import ReadToEnd
from onward.views.web.origin import Hosts


@dataclass(frozen=True)
class PageSettings:
    """How a page is served.

    Args:
        hosts: names that it answers to.
        key: the page's token.
        read_only: whether it offers nothing that changes a run.
        seconds: time between two looks at a run that a browser follows.
    """

    hosts: Hosts
    key: Key = field(default_factory=Key)
    read_only: bool = False
    seconds: float = SECONDS


def make_app(runs: Sequence[NamedRun], settings: PageSettings) -> Starlette:
    """Return the application for these runs: a single one has the plain addresses, several have `/runs/NAME/`."""
    several = len(runs) != 1
    routes = {
        run.name: RunRoutes(run, home=several, read_only=settings.read_only, seconds=settings.seconds) for run in runs
    }
    everything = _Everything(routes)
    paths: list[BaseRoute] = [
        Route("/metrics", knowing(everything.metrics), methods=["GET"]),
        Route("/api/runs", knowing(everything.runs), methods=["GET"]),
        Mount("/static", StaticFiles(directory=STATIC)),
        *(Mount(f"/runs/{name}", routes=route.routes()) for name, route in routes.items()),
    ]
    paths += [Route("/", everything.page, methods=["GET"])] if several else next(iter(routes.values())).routes()
    access = Middleware(RequireAccess, key=settings.key, hosts=settings.hosts, read_only=settings.read_only)
    errors = {
        OnwardError: onward_error,
        HTTPException: http_error,
        ClientDisconnect: gone,
        sqlite3.Error: machine_error,
        OSError: machine_error,
        Exception: unforeseen,
    }
    middleware = [Middleware(ReadToEnd), access]
    app = Starlette(routes=paths, middleware=middleware, exception_handlers=errors, lifespan=_lifespan(routes))
    app.state.let_go = lambda: _let_go(routes)
    return app


async def _let_go(routes: dict[str, RunRoutes]) -> None:
    """End what requests wait for, so that none keeps the server from exiting."""
    for route in routes.values():
        await route.watcher.end()
        await route.talker.end()


def _lifespan(routes: dict[str, RunRoutes]) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        warming = Warming([route.reader for route in routes.values()])
        warming.start()
        try:
            yield
        finally:
            warming.end()
            await _let_go(routes)

    return lifespan


class _Everything:
    """What is answered for all runs together."""

    def __init__(self, routes: dict[str, RunRoutes]) -> None:
        self._routes = routes

    async def page(self, _: Request) -> Response:
        return list_page()

    async def runs(self, _: Request) -> Response:
        return json_answer(await to_thread.run_sync(self._runs))

    async def metrics(self, _: Request) -> Response:
        return Response(await to_thread.run_sync(self._metrics), headers={"Content-Type": CONTENT_TYPE})

    def _runs(self) -> list[dict[str, Any]]:
        return [{"name": name, "title": route.run.title, **_status(route)} for name, route in self._routes.items()]

    def _metrics(self) -> str:
        statuses: dict[str, dict[str, Any]] = {}
        files: dict[str, dict[str, int]] = {}
        for name, route in self._routes.items():
            with contextlib.suppress(OnwardError, sqlite3.Error, OSError):
                found, counted = route.reader.status(), route.reader.states()
                statuses[name], files[name] = found, counted
        return exposition(statuses, files, [name for name in self._routes if name not in statuses])


def _status(route: RunRoutes) -> dict[str, Any]:
    """Return the status of a run, or why it cannot be read; the other runs are shown in any case."""
    try:
        return {"status": route.reader.status(), "error": None}
    except (OnwardError, sqlite3.Error, OSError) as error:
        return {"status": None, "error": str(error)}
