"""A server that closes connections when it should: neither too late nor too early.

uvicorn by itself waits for the head of a request as long as the sender likes (the attack is known as Slowloris), and
closes a connection on which the rest of a refused request is still coming, so that its sender never sees the refusal.
Where no more files can be opened, asyncio tries to take connections thousands of times a second, each with a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from dataclasses import dataclass
from typing import Any

import anyio
import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onward.errors import UsageError
from onward.startup import ENDINGS
from onward.terminal import say
from onward.views.web.listening import BACKLOG

HEAD_SECONDS = 10.0
"""Seconds in which a request's head has to come after its connection was made or the previous answer was complete."""
MOST_QUIET = 100
"""The most connections without a request; if there are more, the oldest are closed at once."""
STALLED_SECONDS = 60.0
"""Seconds without a byte after which a request with an incomplete body is given up."""
LINGERING_SECONDS = 30.0
"""Seconds for which the rest of an answered request is read."""
LINGERING_STALLED_SECONDS = 5.0
"""Seconds without a byte of it after which the rest is given up."""
SAID_SECONDS = 60.0
"""Seconds after which it is said again that no connection can be taken."""
_SPENT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True)
class _Quiet:
    """Since when a connection has been waiting for a request, and after which one."""

    since: float
    after: Any


def _tells_of_trouble(record: logging.LogRecord) -> bool:
    """Whether a log record of uvicorn reports trouble; that the server's end cuts off answers does not.

    A second Ctrl-C also cuts off the end of the application, of which the traceback comes as a text.
    """
    error, text = record.exc_info[1] if record.exc_info else None, str(record.msg).rstrip()
    is_cut_off = isinstance(error, asyncio.CancelledError) or text.endswith(asyncio.CancelledError.__name__)
    return not is_cut_off and "graceful shutdown" not in text


class Server(uvicorn.Server):
    """uvicorn with limits on waiting.

    Args:
        config: uvicorn's config.
        head_seconds: seconds in which a request's head has to come.
        clock: seconds since any fixed time.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        head_seconds: float = HEAD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config.backlog = 1  # how many connections asyncio tries to take at once
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_tells_of_trouble)
        self._head_seconds = head_seconds
        self._clock = clock
        self._quiet: dict[Any, _Quiet] = {}
        self._said = -SAID_SECONDS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections."""
        asyncio.get_running_loop().set_exception_handler(self._handle_trouble)
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)  # how many wait to be taken

    def _handle_trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Say in a line that no connection can be taken for now; asyncio tries again every second."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in _SPENT):
            loop.default_exception_handler(context)
        elif self._clock() - self._said >= SAID_SECONDS:
            self._said = self._clock()
            what = os.strerror(error.errno)
            say(f"connections have to wait: {what}. Fewer clients help, or a higher limit (ulimit -n)")

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """End at every signal that ends a command, not only at those that uvicorn handles."""
        with super().capture_signals():
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            others = [number for number in ENDINGS if callable(signal.getsignal(number))]
            before = {number: signal.signal(number, self.handle_exit) for number in others}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        """Check all connections; uvicorn calls this ten times a second."""
        self._close_quiet()
        return await super().on_tick(counter)

    def _close_quiet(self) -> None:
        now = self._clock()
        waiting: dict[Any, _Quiet] = {}
        for connection in self.server_state.connections:
            request: Any = getattr(connection, "cycle", None)
            if request is None or request.response_complete:
                before = self._quiet.get(connection)
                waiting[connection] = before if before and before.after is request else _Quiet(now, request)
        self._quiet = waiting
        oldest = sorted(waiting, key=lambda connection: waiting[connection].since)
        for place, connection in enumerate(oldest):
            waited = now - waiting[connection].since
            if waited > 2 * self._head_seconds:  # not even its answer is being read
                connection.transport.abort()
            elif waited > self._head_seconds or place < len(oldest) - MOST_QUIET:
                connection.transport.close()


async def incoming(pieces: AsyncIterator[bytes], seconds: float = STALLED_SECONDS) -> AsyncGenerator[bytes]:
    """Yield the pieces of a request's body as they come.

    Raises:
        UsageError: none came for `seconds`.
    """
    while True:
        try:
            with anyio.fail_after(seconds):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UsageError(f"nothing came for {seconds:.0f} seconds", where="body", hint="Send it again.") from None
        yield piece


class ReadToEnd:
    """ASGI middleware that reads the rest of a request that was answered before all of it had come.

    Closing a connection on which bytes are unread resets it, and whoever still sends never sees the answer. nginx does
    the same (`lingering_close`).

    Args:
        app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and hold the end of its answer back until the request has come."""
        if scope["type"] != "http" or not _sends_body(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        has_come = False

        async def received() -> Message:
            nonlocal has_come
            message = await receive()
            has_come = not message.get("more_body", False)
            return message

        async def sent(message: Message) -> None:
            if has_come or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            with anyio.move_on_after(LINGERING_SECONDS):
                while not has_come:
                    with anyio.move_on_after(LINGERING_STALLED_SECONDS) as stalled:
                        await received()
                    if stalled.cancelled_caught:
                        break
            await send({"type": "http.response.body"})

        await self._app(scope, received, sent)


def _sends_body(headers: Headers) -> bool:
    """Whether a request has a body that comes without being asked for."""
    announced = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    return announced and headers.get("expect", "").lower() != "100-continue"
