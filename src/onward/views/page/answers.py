"""How values and errors become answers, and how numbers and wishes are read from requests."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from onward.errors import FileRejected, NoSpace, NotMadeHere, OnwardError, RunLocked, UsageError
from onward.text import finite, printable
from onward.views.web.connections import incoming

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

BODY_BYTES = 64 << 10
"""The most bytes of a request's body, unless a route says otherwise."""
STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (FileRejected, 422), (RunLocked, 409), (NotMadeHere, 409), (NoSpace, 507), (UsageError, 400),
)  # fmt: skip
"""The status of an answer by the kind of error; 500 for all others."""


def as_json(value: Any) -> str:
    """Return a value as JSON; a number that JSON cannot express becomes null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False)


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a value as JSON."""
    return Response(as_json(value), status, headers, media_type="application/json")


def refusal(status: int, what: str, hint: str | None = None, *, where: str | None = None, **headers: str) -> Response:
    """Return an error in the shape that all errors of the page have.

    Args:
        headers: more of the answer's, by name.
    """
    return json_answer({"error": what, "where": where, "hint": hint}, status, headers)


async def onward_error(_: Request, error: Exception) -> Response:
    """Answer with an error that the user can fix, as `--json` prints it."""
    assert isinstance(error, OnwardError)
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    return json_answer(error.to_dict(), status)


async def http_error(_: Request, error: Exception) -> Response:
    """Answer a request for an unknown address, or with a method that it does not allow."""
    assert isinstance(error, HTTPException)
    words = {404: "there is no such address", 405: "this address does not take this method"}
    what = words.get(error.status_code, error.detail)
    return refusal(error.status_code, what, "docs/page.md lists the addresses.", **dict(error.headers or {}))


async def machine_error(_: Request, error: Exception) -> Response:
    """Answer if the machine fails: the ledger or a disk is busy."""
    hint = "onward doctor says more. What was committed is safe."
    return refusal(503, printable(str(error) or type(error).__name__), hint)


async def unforeseen(_: Request, error: Exception) -> Response:
    """Answer if Onward itself is wrong; the server prints where."""
    del error
    return refusal(500, "the page failed; its own output says why", "What was committed is safe.")


def number(request: Request, name: str, *, least: int = 0, most: int = 2**62) -> int | None:
    """Return a number from the query; None if it is absent.

    Raises:
        UsageError: it is not such a number.
    """
    text = request.query_params.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) >= least):
        raise UsageError(f"{name} must be a number from {least} up, not {printable(text)}", where=name)
    return min(int(text), most)


async def gone(_: Request, error: Exception) -> Response:
    """Answer nobody: the client went away before the request was complete."""
    del error
    return Response(status_code=400)


async def wanted(request: Request, known: Collection[str], most: int = BODY_BYTES) -> dict[str, Any]:
    """Return the JSON object in a request; an empty one if it has no body.

    Args:
        known: keys that it may have.
        most: bytes that it may have.

    Raises:
        UsageError: it is not an object, is too large, or has a key that would be ignored.
    """
    body = bytearray()
    async for chunk in incoming(request.stream()):
        body += chunk
        if len(body) > most:
            raise UsageError(f"the request has more than {most} bytes", where="body")
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("the request is not JSON", where="body") from None
    if not isinstance(value, dict):
        raise UsageError("the request is not a JSON object", where="body", hint='For example {"file": "day-2.jsonl"}.')
    _require_known(value, known)
    return value


def knowing(answer: Endpoint, *known: str) -> Endpoint:
    """Return an endpoint that refuses a query with a key that it would ignore.

    Args:
        known: keys that the query may have.
    """

    async def checked(request: Request) -> Response:
        _require_known(request.query_params, known)
        return await answer(request)

    return checked


def _require_known(keys: Iterable[str], known: Collection[str]) -> None:
    for key in keys:
        if key not in known:
            hint = f"There are: {', '.join(known)}." if known else "Nothing can be said here."
            raise UsageError("nothing is known by this name here", where=printable(key), hint=hint)
