"""Messages in all the forms that rows have, converted into one: `role`, `content` and whatever else they say.

The forms are those of OpenAI (chat completions, old and new), ShareGPT, LLaMA-Factory, Axolotl and TRL.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeGuard

from onward.data.row_types import Message, RowError, check_answer, check_strings, check_text, kind_of
from onward.data.rows.calls import called, calls_of, json_text

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Role names that other tools use, and the names of these roles here."""

CALL_ROLES = ("function_call", "tool_call")
"""Roles whose text is a call in JSON."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
WEIGHT_KEYS = ("weight", "train", "training", "loss", "loss_weight")
"""Keys that say whether a message, or a whole row, is in the loss."""

SAID = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}
"""Weights as text: a table of strings has nothing else."""
LARGEST_WEIGHT, SMALLEST_WEIGHT = 1e6, 1e-6
"""A larger weight is a mistake and would drown out all other rows of its step; a smaller one is lost in float32."""

THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
"""A thought at the beginning of an answer."""

SPAN_KEYS = ("train_detail", "training_detail")
CONTENT_KEYS = ("content", "value")
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("thinking", "reasoning")
CALL_PARTS = ("tool_use", "tool_call", "function_call", "tool_result", "tool_response", "function_response")
"""Types of content parts that are tool calls or their results, in Anthropic's messages and others."""
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos", "image_url", "input_audio", "video_url")
MEDIA_PARTS = (*MEDIA_KEYS, "input_image", "audio_url", "input_video")
HANDLED = frozenset(
    ("role", "from", *CONTENT_KEYS, "tool_calls", "function_call", *REASONING_KEYS, *WEIGHT_KEYS, *SPAN_KEYS)
)
"""Keys of a message that are converted into the one form; all others are passed on as they are."""


def message_list(value: Any, key: str) -> list[Message]:
    """Return a list of messages, which may be given as JSON text.

    Raises:
        RowError: it is not a list of objects, or it is empty.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = json_text(value, f'"{key}"')
    if not isinstance(value, list):
        raise RowError(f'"{key}" is {kind_of(value)}, not a list', f'write "{key}" as a list of messages')
    if not value:
        raise RowError(f'"{key}" is empty', "add at least a user and an assistant message")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowError(f'"{key}" holds {kind_of(turn)} at place {number}', "write each message as an object")
    return value


def list_in_text(text: str) -> list[Message] | None:
    """Return the messages that a text holds as JSON; None if it is any other text."""
    if text.lstrip()[:1] != "[":
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_messages = isinstance(found, list) and found and all(_is_message(turn) for turn in found)
    return json_text(text, "the list of messages") if is_messages else None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(value.get(key), str) and value[key] in (*ROLES, *OTHER_ROLES) for key in ("role", "from")
    )


def message_of(turn: Message, number: int, *, padded: bool) -> tuple[Message, float | None]:
    """Return a message in the one form, and the loss weight that it gives itself; None if it gives none.

    Args:
        turn: the message as the row has it.
        number: its 1-based place in the chat.
        padded: whether null fields of arguments are padding.

    Raises:
        RowError: the message breaks a rule.
    """
    content, role = turn.get("content"), turn.get("role")
    if len(turn) == 2 and isinstance(content, str) and role in ROLES:  # as in nearly every message
        where = f"message {number}"
        if role == "assistant":
            check_answer(content, f"the answer in {where}")
        else:
            check_text(content, where)
        return {"role": role, "content": content}, None
    return _message(turn, f"message {number}", padded=padded)


def _message(turn: Message, where: str, *, padded: bool) -> tuple[Message, float | None]:
    named = _role(turn, where)
    role = OTHER_ROLES.get(named, named)
    _refuse_media(turn, where)
    text, thoughts = _content(turn, where)
    calls = calls_of(turn, where, padded=padded)
    if named in CALL_ROLES:
        calls, text = [*called(text or "", where), *calls], ""
    if calls and role != "assistant":
        raise RowError(f"{where} calls a tool, but its role is {role!r}", "give calls to the assistant")
    if text is None and not calls:
        raise RowError(f"{where} has no content", 'give the message a "content" string')
    message: Message = {"role": role, "content": text or ""}
    if role == "assistant" and not calls:
        check_answer(message["content"], f"the answer in {where}")
    else:
        check_text(message["content"], where)
    if calls:
        message["tool_calls"] = calls
    reasoning = _separate_reasoning(_reasoning(turn, thoughts, where), message, where)
    if reasoning is not None:
        message |= {"reasoning_content": reasoning, "thinking": reasoning}  # templates differ in which name they read
    message |= {key: value for key, value in turn.items() if key not in HANDLED and value is not None}
    return message, _weight(turn, role, where)


def _role(turn: Message, where: str) -> str:
    key = "role" if turn.get("role") is not None or turn.get("from") is None else "from"
    role = turn.get(key)
    if isinstance(role, str) and (role in ROLES or role in OTHER_ROLES):
        return role
    if key == "from":
        raise RowError(f'unknown "from": {role!r}', f"use one of {', '.join((*ROLES, *OTHER_ROLES))}")
    raise RowError(f"{where} has the unknown role {role!r}", f"use one of {', '.join(ROLES)}")


def _content(turn: Message, where: str) -> tuple[str | None, list[str]]:
    """Return the text of a message (None if it has none) and the reasoning parts next to the text."""
    content = next((turn[key] for key in CONTENT_KEYS if turn.get(key) is not None), None)
    if content is None or isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RowError(
            f"the content of {where} is {kind_of(content)}", "write the content as a string or a list of text parts"
        )
    return _in_parts(content, where)


def text_of_parts(parts: list[Any], where: str) -> str:
    """Return the text of a list of parts.

    Raises:
        RowError: one of them is not text.
    """
    text, thoughts = _in_parts(parts, where)
    if thoughts:
        raise RowError(f"the content of {where} contains a thought", "move it into a message of the assistant")
    return text or ""


def _in_parts(content: list[Any], where: str) -> tuple[str | None, list[str]]:
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind, text = _part(part, where)
        if kind in THINKING_PARTS and any(piece.strip() for piece in texts):
            raise RowError(f"a thought comes after the text of {where}", "put thoughts before the text")
        (thoughts if kind in THINKING_PARTS else texts).append(text)
    return "".join(texts) if texts or not thoughts else None, thoughts


def _part(part: Any, where: str) -> tuple[str, str]:
    if not isinstance(part, dict):
        raise RowError(f"the content of {where} contains {kind_of(part)}", 'write each part as {"type": "text", ...}')
    kind = part.get("type", "text")
    if kind in MEDIA_PARTS:
        raise RowError(f"{where} contains a part of type {kind!r}: only text is trained", "remove the row")
    if kind in TEXT_PARTS or kind in THINKING_PARTS:
        text = next((part[key] for key in (kind, "text", "value", "content") if isinstance(part.get(key), str)), None)
        if text is not None:
            return kind, text
    if kind in CALL_PARTS:
        raise RowError(
            f"{where} contains a part of type {kind!r}",
            'write calls as "tool_calls" of the assistant, and their results as messages of the role "tool"',
        )
    raise RowError(
        f"the content of {where} contains a part of type {kind!r} without a known text",
        'write each part as {"type": "text", "text": ...}',
    )


def _reasoning(turn: Message, thoughts: list[str], where: str) -> str | None:
    """Return the reasoning of a message; None if it has none. Rows have "" where a model did not reason."""
    given = [turn[key] for key in REASONING_KEYS if turn.get(key) is not None]
    if any(not isinstance(value, str) for value in given):
        raise RowError(f"the reasoning of {where} is not a string", 'write "reasoning_content" as a string')
    found: list[str] = list(dict.fromkeys(given))
    found += ["\n".join(thoughts)] if thoughts and "\n".join(thoughts) not in found else []
    if len(found) > 1:
        raise RowError(f"{where} has two different thoughts", "keep one of them")
    check_strings(found, where)
    return found[0] if found else None


def _separate_reasoning(reasoning: str | None, message: Message, where: str) -> str | None:
    """Return the reasoning given next to a content; an empty one does not count if the content has a thought.

    Raises:
        RowError: there are two thoughts.
    """
    if reasoning is None or message["role"] != "assistant" or not THOUGHT.match(message["content"]):
        return reasoning
    if not reasoning.strip():
        return None
    raise RowError(
        f"{where} has a thought both in its content and next to it", "keep one of them: both would be trained"
    )


def _weight(turn: Message, role: str, where: str) -> float | None:
    for key in SPAN_KEYS:
        if turn.get(key):
            raise RowError(f'{where} has "{key}": parts of a message cannot have weights', f'leave "{key}" out')
    says = said_weight(turn, where)
    if says and role != "assistant":
        raise RowError(
            f"{where} puts a text of the {role} into the loss, which covers only answers",
            f"take {', '.join(WEIGHT_KEYS)} out of messages that are not the assistant's",
        )
    return says


def said_weight(value: Message, where: str) -> float | None:
    """Return the loss weight that a message or a row gives itself; 0 for none, None if it does not say.

    Keys with a yes or no do not say how much: alongside `train: true`, another key may have a number.

    Raises:
        RowError: a value is not a weight, or two keys give different ones.
    """
    found: dict[str, float] = {}
    for key in WEIGHT_KEYS:
        weight = weight_of(value.get(key))
        if weight is None:
            continue
        if not _is_weight(weight):
            said = repr(weight) if isinstance(weight, int | float) else kind_of(weight)
            remedy = f'write "{key}" as 0 (not in the loss), 1, or a weight from 1e-6 to 1e6, or leave it out'
            raise RowError(f'"{key}" of {where} is {said}', remedy)
        found[key] = float(weight)
    if 0 in found.values() or not found:
        return 0.0 if found else None
    others = {key: weight for key, weight in found.items() if weight != 1}
    if len(set(others.values())) > 1:
        named = " and ".join(f'"{key}" {weight:g}' for key, weight in others.items())
        raise RowError(f"{where} has two weights: {named}", "keep one of them")
    return next(iter(others.values()), 1.0)


def _is_weight(value: Any) -> TypeGuard[float]:
    return isinstance(value, bool | int | float) and (value == 0 or SMALLEST_WEIGHT <= value <= LARGEST_WEIGHT)


def weight_of(value: Any) -> Any:
    """Return a weight or a label as a number if it is written as text; None for an empty text."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in SAID or not word:
        return SAID.get(word)
    try:
        return float(word)
    except ValueError:
        return value


def _refuse_media(turn: Message, where: str) -> None:
    for key in MEDIA_KEYS:
        if turn.get(key):
            raise RowError(f'{where} has "{key}": only text is trained', "remove the row")
