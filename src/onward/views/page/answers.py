"""How values and errors become answers, and how numbers and wishes are read from requests."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from onward.errors import FileRejected, NoSpace, NotMadeHere, OnwardError, RunLocked, UsageError
from onward.text import printable
from onward.views.connections import incoming

BODY_BYTES = 64 << 10
"""The most bytes of a request's body."""
STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (FileRejected, 422), (RunLocked, 409), (NotMadeHere, 409), (NoSpace, 507), (UsageError, 400),
)  # fmt: skip
"""The status of an answer by the kind of error; 500 for all others."""


def json_answer(value: Any, status: int = 200) -> Response:
    """Return a value as JSON; a number that JSON cannot express becomes null."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), allow_nan=False)
    return Response(text, status, media_type="application/json")


async def onward_error(_: Request, error: Exception) -> Response:
    """Answer with an error that the user can fix, as `--json` prints it."""
    assert isinstance(error, OnwardError)
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    return json_answer(error.to_dict(), status)


async def http_error(_: Request, error: Exception) -> Response:
    """Answer a request for an unknown address, or with a method that it does not allow."""
    assert isinstance(error, HTTPException)
    return json_answer({"error": error.detail, "hint": None}, error.status_code)


async def machine_error(_: Request, error: Exception) -> Response:
    """Answer if the machine fails: the ledger or a disk is busy."""
    hint = "onward doctor says more. What was committed is safe."
    return json_answer({"error": printable(str(error)), "hint": hint}, 503)


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


async def wanted(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request; an empty one if it has no body.

    Raises:
        UsageError: it is not an object, or too large.
    """
    body = bytearray()
    async for chunk in incoming(request.stream()):
        body += chunk
        if len(body) > BODY_BYTES:
            raise UsageError(f"the request has more than {BODY_BYTES} bytes", where="body")
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("the request is no JSON", where="body") from None
    if not isinstance(value, dict):
        raise UsageError("the request is no JSON object", where="body", hint='For example {"file": "day-2.jsonl"}.')
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
