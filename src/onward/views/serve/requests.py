"""Checks what a client of OpenAI's interface asks for: what cannot be done is refused, never ignored."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from onward.data.row_types import Message, RowError
from onward.data.rows.calls import calls_of
from onward.errors import UsageError
from onward.text import printable
from onward.views.chat.sampling import Sampling

MOST_TOKENS = 512
"""The most tokens of an answer if the request does not say."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"), "functions": ([],), "modalities": (["text"],), "parallel_tool_calls": (True,),
}  # fmt: skip
"""Keys that ask for unsupported features, with the values that are harmless."""
FOLLOWED = frozenset((
    "model", "messages", "prompt", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed",
    "stop", "tools", "stream", "stream_options",
))  # fmt: skip
"""Keys that are followed."""
UNRELATED = frozenset((
    "user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
))  # fmt: skip
"""Keys that matter to OpenAI's own service only, not to the answer."""
OF_STREAMS = frozenset(("include_usage", "include_obfuscation"))
"""Keys of `stream_options`; the second is about the length of what is sent, not the answer."""
ELSEWHERE = {True: ("prompt",), False: ("messages", "tools")}
"""Keys that are followed at the other address only, by whether this one is that of chats."""


class BadRequest(Exception):
    """A request cannot be answered; `param` is the key to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        messages: messages of a chat; None if a text is to be continued.
        text: the text to continue; None for a chat.
        sampling: how the answer is drawn.
        stops: texts before which it ends.
        tools: schemas for the chat template.
        stream: whether the answer is sent piece by piece.
        with_usage: whether a stream ends with the numbers of tokens.
    """

    messages: list[Message] | None
    text: str | None
    sampling: Sampling
    stops: list[str]
    tools: list[Any] | None
    stream: bool
    with_usage: bool


def read_request(body: Any, *, is_chat: bool) -> Asked:
    """Return what a request asks for.

    Raises:
        BadRequest: it is malformed, or asks for something unsupported.
    """
    if not isinstance(body, dict):
        raise BadRequest("the request is not a JSON object")
    values = cast(dict[str, Any], body)
    for key, neutral in NEUTRAL.items():
        if values.get(key) is not None and values[key] not in neutral:
            raise BadRequest(f"{key} is not supported here", key)
    for key in ELSEWHERE[is_chat]:
        if values.get(key):
            raise BadRequest(f"{key} is not supported at this address", key)
    _require_known(values, FOLLOWED | UNRELATED | NEUTRAL.keys())
    options = _of_kind(values, "stream_options", dict) or {}
    _require_known(options, OF_STREAMS)
    return Asked(
        messages=_messages(values.get("messages")) if is_chat else None,
        text=None if is_chat else _prompt(values.get("prompt")),
        sampling=_sampling(values),
        stops=_stops(values.get("stop")),
        tools=_tools(values) if is_chat else None,
        stream=bool(_of_kind(values, "stream", bool)),
        with_usage=bool(_of_kind(options, "include_usage", bool)),
    )


def _require_known(values: Mapping[str, Any], known: Collection[str]) -> None:
    for key, value in values.items():
        if value is not None and key not in known:
            raise BadRequest(f"{printable(key)[:60]} is not known here", key)


def _sampling(values: Mapping[str, Any]) -> Sampling:
    most = "max_tokens" if values.get("max_completion_tokens") is None else "max_completion_tokens"
    seed = values.get("seed")
    try:
        return Sampling(
            temperature=_number(values, "temperature", 1.0),
            top_p=_number(values, "top_p", 1.0),
            top_k=_integer(values.get("top_k"), "top_k", 0),
            max_tokens=_integer(values.get(most), most, MOST_TOKENS),
            seed=secrets.randbits(32) if seed is None else _integer(seed, "seed", 0),
        )
    except UsageError as error:
        raise BadRequest(f"{error.what}: {error.hint}", error.where) from None


def _tools(values: Mapping[str, Any]) -> list[Any] | None:
    tools = _of_kind(values, "tools", list)
    if not all(isinstance(tool, dict) for tool in tools or ()):
        raise BadRequest("tools must be objects", "tools")
    return tools or None


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a list of messages", "messages")
    return [_message(item, place) for place, item in enumerate(cast(list[Any], value))]


def _message(value: Any, place: int) -> Message:
    where = f"messages[{place}]"
    if not isinstance(value, dict) or not isinstance(cast(dict[str, Any], value).get("role"), str):
        raise BadRequest(f"{where} has no role", where)
    message = {key: item for key, item in cast(dict[str, Any], value).items() if item is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in cast(list[Any], content))
    if not isinstance(content, str):
        raise BadRequest(f"the content of {where} is not a string", where)
    try:
        calls = calls_of(message, where, padded=False)
    except RowError as error:
        raise BadRequest(f"{error.reason}: {error.remedy}", where) from None
    others = {key: item for key, item in message.items() if key not in ("tool_calls", "function_call")}
    return {**others, "content": content, **({"tool_calls": calls} if calls else {})}


def _part(part: Any, where: str) -> str:
    values = cast(dict[str, Any], part) if isinstance(part, dict) else {}
    if values.get("type") != "text" or not isinstance(values.get("text"), str):
        raise BadRequest(f"{where} contains something other than text, which the model does not take", where)
    return values["text"]


def _prompt(value: Any) -> str:
    texts = cast(list[Any], value) if isinstance(value, list) else [value]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise BadRequest("prompt must be one string", "prompt")
    return texts[0]


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in cast(list[Any], stops)):
        raise BadRequest("stop must be a string or a list of strings", "stop")
    return cast(list[str], stops)


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{key} must be a number", key)
    try:
        return float(value)
    except OverflowError:
        raise BadRequest(f"{key} is too large", key) from None


def _integer(value: Any, key: str, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{key} must be a whole number", key)
    return value


_KINDS = {list: "a list", dict: "an object", bool: "true or false"}
"""How JSON's kinds of values are named."""


def _of_kind(values: Mapping[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    if value is not None and not isinstance(value, kind):
        raise BadRequest(f"{key} must be {_KINDS[kind]}", key)
    return value
