"""The row formats: a parsed JSON value becomes a `Chat`, a `Completion` or a `Text`, or is refused with a reason.

Which format a row has is read from its keys; keys whose value is null do not count, and unknown keys are ignored.
The formats are those of OpenAI and TRL (`messages`, `prompt`/`completion`, `text`), ShareGPT and Stanford Alpaca.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
PASSED_ON = ("tool_calls", "tool_call_id", "name")  # what chat templates read besides role and content
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
SHAPES = (
    '{"messages": [...]}, {"conversations": [...]}, {"prompt": ..., "completion": ...}, '
    '{"instruction": ..., "output": ...} or {"text": ...}'
)
HALVES = {"prompt": "completion", "completion": "prompt", "instruction": "output", "output": "instruction"}


@dataclass(frozen=True)
class UnreadableValue:
    """Stands for a value that Python cannot hold; harmless under a key that no row format asks for."""

    reason: str


class RowError(Exception):
    """A row that cannot be trained on.

    Args:
        reason: what is wrong with the row.
        remedy: what to change.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class Chat:
    """A conversation; the loss covers every assistant turn.

    Each message has `role` and `content` (strings) and, where the row has them, the keys that templates read.
    """

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation; the loss covers the continuation."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text; the loss covers all of it."""

    text: str


Record: TypeAlias = Chat | Completion | Text


def parse_row(value: object) -> Record:
    """Return the row that a parsed JSON value stands for.

    Raises:
        RowError: the value has none of the formats, or breaks the rules of its format.
    """
    if not isinstance(value, dict):
        raise RowError(f"the row is {_kind(value)}, not an object", f"write each row as {SHAPES}")
    row: dict[str, Any] = {str(key): item for key, item in value.items() if item is not None}
    for keys, parse in PARSERS:
        if all(key in row for key in keys):
            return parse(row)
    for key, missing in HALVES.items():
        if key in row:
            raise RowError(f'the row has "{key}" but no "{missing}"', f'add "{missing}" to the row')
    found = ", ".join(f'"{key[:80]}"' for key in list(row)[:10]) or "none"
    raise RowError(f"no known row format (keys with a value: {found})", f"write each row as {SHAPES}")


def _messages_row(row: dict[str, Any]) -> Chat:
    return _chat(row, _message_list(row["messages"], "messages"))


def _sharegpt_row(row: dict[str, Any]) -> Chat:
    turns = [_sharegpt_message(turn) for turn in _message_list(row["conversations"], "conversations")]
    return _chat(row, _system_message(row) + turns)


def _prompt_row(row: dict[str, Any]) -> Chat | Completion:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(row, _message_list(prompt, "prompt") + _message_list(completion, "completion"))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise RowError(
            f'"prompt" is {_kind(prompt)} and "completion" is {_kind(completion)}',
            "make both strings, or both lists of messages",
        )
    _check_text(prompt, "prompt")
    _check_answer(completion, "completion")
    return Completion(prompt, completion)


def _alpaca_row(row: dict[str, Any]) -> Chat:
    instruction = _string(row, "instruction")
    question = "\n\n".join(part for part in (instruction, _string(row, "input")) if part)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _string(row, "output")}]
    return _chat(row, _system_message(row) + turns)


def _text_row(row: dict[str, Any]) -> Text:
    text = _string(row, "text")
    _check_answer(text, "text")
    return Text(text)


PARSERS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], Record]], ...] = (
    (("messages",), _messages_row),
    (("conversations",), _sharegpt_row),
    (("prompt", "completion"), _prompt_row),
    (("instruction", "output"), _alpaca_row),
    (("text",), _text_row),
)


def _chat(row: dict[str, Any], turns: list[Message]) -> Chat:
    messages = [_message(turn, f"message {number}") for number, turn in enumerate(turns, start=1)]
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("the chat has no assistant turn", "add the assistant's answer as the last message")
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"the last message is the {messages[-1]['role']}'s: the answer is missing",
            "end the chat with an assistant message",
        )
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f'"tools" is {_kind(tools)}, not a list', 'write "tools" as a list of JSON schemas')
    _check_strings(tools, "tools")
    return Chat(messages, tools or None)


def _message_list(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(f'"{key}" is {_kind(value)}, not a list', f'write "{key}" as a list of messages')
    if not value:
        raise RowError(f'"{key}" is empty', "add at least a user and an assistant message")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowError(f'"{key}" holds {_kind(turn)} at place {number}', "write each message as an object")
    return value


def _message(turn: Message, where: str) -> Message:
    role = turn.get("role")
    if role not in ROLES:
        raise RowError(f"{where} has the unknown role {role!r}", f"use one of {', '.join(ROLES)}")
    calls = turn.get("tool_calls")
    message: Message = {"role": role, "content": _content(turn, where, optional=role == "assistant" and bool(calls))}
    if role == "assistant" and not calls:
        _check_answer(message["content"], f"the answer in {where}")
    else:
        _check_text(message["content"], where)
    if len(turn) == 2 and "content" in turn:  # role and content alone, as in nearly every message
        return message
    extra = {key: turn[key] for key in PASSED_ON if turn.get(key) is not None}
    reasoning = next((turn[key] for key in REASONING_KEYS if turn.get(key) is not None), None)
    if reasoning is not None:
        extra |= {"reasoning_content": reasoning, "thinking": reasoning}  # templates differ in the name they read
    _check_strings(extra, where)
    return message | extra


def _content(turn: Message, where: str, *, optional: bool) -> str:
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return ""
        raise RowError(f"{where} has no content", 'give the message a "content" string')
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    raise RowError(
        f"the content of {where} is {_kind(content)}", "write the content as a string or a list of text parts"
    )


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _sharegpt_message(turn: Message) -> Message:
    if "from" not in turn:
        return turn
    role = SHAREGPT_ROLES.get(str(turn["from"]))
    if role is None:
        raise RowError(f'unknown "from": {turn["from"]!r}', f"use one of {', '.join(SHAREGPT_ROLES)}")
    return {**turn, "role": role, "content": turn.get("value")}


def _system_message(row: dict[str, Any]) -> list[Message]:
    system = _string(row, "system")
    return [{"role": "system", "content": system}] if system else []


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise RowError(f'"{key}" is {_kind(value)}, not a string', f'write "{key}" as a string')
    return value


def _check_answer(text: str, where: str) -> None:
    if not text.strip():
        raise RowError(f"{where} is empty", "write what the model should answer, or remove the row")
    _check_text(text, where)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(
            f"{where} holds half of a surrogate pair, which is not a character",
            "export the file again as UTF-8, or remove the broken \\ud800-\\udfff escape",
        ) from None


def _check_strings(value: Any, where: str) -> None:
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key, where)
            _check_strings(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, where)
    elif value is not None and not isinstance(value, bool | int | float):
        raise RowError(f"{where} holds {_kind(value)}, which JSON does not know", "write it as a string")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, UnreadableValue):
        return f"a value that cannot be read ({value.reason})"
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bytes: "binary data",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")
