"""The interface over HTTP: routes, and who may ask.

transformers has a server of its own. It loads whatever model a request names, even from the network, seeds the
process's global generator, and cannot put another adapter into a model that is answering; so the routes are here.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive

from onward.errors import OnwardError, UsageError
from onward.views.chat.engine import Engine, Reply
from onward.views.serve.answers import Shape, event, failure
from onward.views.serve.requests import Asked, BadRequest, read_request
from onward.views.web.addresses import NameRoute
from onward.views.web.connections import ReadToEnd, incoming
from onward.views.web.origin import Hosts, bearer

LARGEST = 8 << 20
"""The most bytes of a request."""


@dataclass(frozen=True)
class Service:
    """What the routes need.

    Args:
        engine: gives the answers.
        model: the name under which the model is listed.
        key: what `Authorization: Bearer` must contain; None lets everybody ask who can reach the port.
        hosts: names under which the server may be addressed, and whose pages may ask. None is for a server that other
            machines reach, with the key: it takes every name and refuses all pages.
    """

    engine: Engine
    model: str
    key: str | None
    hosts: Hosts | None

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            NameRoute("/v1/models", self.one_model, methods=["GET"]),
            Route("/health", self.health),
        ]
        handlers: Any = {BadRequest: _refused, HTTPException: _unknown, ClientDisconnect: _gone, Exception: _failed}
        return Starlette(routes=routes, middleware=[Middleware(ReadToEnd)], exception_handlers=handlers)

    async def chat(self, request: Request) -> Response:
        """Answer messages."""
        return await self._answer(request, is_chat=True)

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer(request, is_chat=False)

    async def models(self, request: Request) -> Response:
        """List the one model."""
        refusal = self._refuse(request)
        return refusal or JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        """Describe the one model."""
        refusal = self._refuse(request)
        if refusal is None and request.path_params["name"] != self.model:
            refusal = JSONResponse(failure(f"there is no such model; the model here is {self.model}"), 404)
        return refusal or JSONResponse(self._described())

    async def health(self, request: Request) -> Response:
        """Say that the server answers."""
        return self._refuse_name(request) or JSONResponse({"status": "ok"})

    def _described(self) -> dict[str, Any]:
        loaded = self.engine.loaded
        return {
            "id": self.model, "object": "model", "created": int(time.time()), "owned_by": "onward",
            "step": loaded.step, "state": loaded.label,
        }  # fmt: skip

    def _refuse(self, request: Request) -> Response | None:
        """Return the refusal of a request under another name, from a page of another site, or without the key."""
        misnamed = self._refuse_name(request)
        if misnamed is not None:
            return misnamed
        origin = request.headers.get("origin")
        if origin is not None and (self.hosts is None or not self.hosts.know(origin.partition("://")[2])):
            return JSONResponse(failure("requests from pages of other sites are refused"), 403)
        if self.key is not None and not hmac.compare_digest(bearer(request.headers).encode(), self.key.encode()):
            return JSONResponse(failure("the API key is missing or wrong", kind="authentication_error"), 401)
        return None

    def _refuse_name(self, request: Request) -> Response | None:
        if self.hosts is None or self.hosts.know(request.headers.get("host", "")):
            return None
        return JSONResponse(failure("this server has no such host name"), 403)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        refusal = self._refuse(request)
        if refusal is not None:
            return refusal
        asked = read_request(await _body(request), is_chat=is_chat)
        reply = await run_in_threadpool(self._begin, asked)
        shape = Shape(is_chat, self.model)
        if asked.stream:
            return _Streamed(reply, _events(reply, shape, asked))
        leaving = asyncio.create_task(_cancel_when_left(request, reply))
        try:
            return JSONResponse(shape.whole(await run_in_threadpool(lambda: reply.outcome)))
        except OnwardError as error:
            return JSONResponse(failure(error.what, kind="server_error"), 500)
        finally:
            leaving.cancel()
            reply.cancel()

    def _begin(self, asked: Asked) -> Reply:
        try:
            if asked.messages is None:
                return self.engine.go_on(asked.text or "", asked.sampling, stops=asked.stops)
            return self.engine.reply(asked.messages, asked.sampling, stops=asked.stops, tools=asked.tools)
        except UsageError as error:
            raise BadRequest(error.what, "prompt" if asked.messages is None else "messages") from None


class _Streamed(StreamingResponse):
    """An answer that is sent piece by piece, and given up when its client goes away, even before its turn has come."""

    def __init__(self, reply: Reply, events: AsyncGenerator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._reply = reply

    async def listen_for_disconnect(self, receive: Receive) -> None:
        """Cancel the answer when its client is gone: the thread that waits for its next piece cannot be interrupted."""
        await super().listen_for_disconnect(receive)
        self._reply.cancel()


async def _body(request: Request) -> Any:
    """Return the JSON of a request, reading no more than it may have."""
    data = bytearray()
    try:
        async for chunk in incoming(request.stream()):
            data += chunk
            if len(data) > LARGEST:
                raise BadRequest(f"the request is longer than {LARGEST} bytes")
        return json.loads(bytes(data))
    except UsageError as error:
        raise BadRequest(error.what) from None
    except (ValueError, RecursionError):
        raise BadRequest("the request is not JSON") from None


async def _events(reply: Reply, shape: Shape, asked: Asked) -> AsyncGenerator[str]:
    """Yield an answer as events; if the client goes away, the answer ends."""
    try:
        yield shape.first()
        async for piece in iterate_in_threadpool(reply):
            yield shape.piece(piece)
        yield shape.last(reply.outcome, with_usage=asked.with_usage)
    except OnwardError as error:
        yield event(failure(error.what, kind="server_error"))
    finally:
        reply.cancel()


async def _cancel_when_left(request: Request, reply: Reply) -> None:
    """End an answer when its client goes away, so that the next client need not wait for it."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    reply.cancel()


async def _unknown(request: Request, error: HTTPException) -> Response:
    """Answer an address that there is not, or a method that it does not have."""
    where = f"{request.method} {request.url.path}"
    return JSONResponse(
        failure(f"{where}: {error.detail}; docs/serve.md lists what is answered"), error.status_code, error.headers
    )


async def _refused(request: Request, error: BadRequest) -> Response:
    del request
    return JSONResponse(failure(str(error), param=error.param), 400)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    """Answer nobody: the client went away before its request was complete."""
    del request, error
    return Response(status_code=400)


async def _failed(request: Request, error: Exception) -> Response:
    del request, error
    return JSONResponse(failure("the server failed; its own output says why", kind="server_error"), 500)
