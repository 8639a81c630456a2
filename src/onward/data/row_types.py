"""What a row can be: a `Chat`, a `Completion` or a `Text`; and the refusal of a row that is none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, TypeAlias

KEY_LENGTH = 80
"""The most characters shown of a key, which may be as long as a row."""

Message: TypeAlias = dict[str, Any]

UNSEEN = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u00ad\u200b\u200c\u200d\u2060\ufeff"
"""White space and zero-width characters: a text of nothing else counts as empty."""


@dataclass(frozen=True)
class UnreadableValue:
    """A placeholder for a value that Python cannot represent; harmless under a key that no row format reads."""

    reason: str


class RowError(Exception):
    """A row cannot be trained on.

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
    """A conversation; the loss covers its assistant turns.

    Args:
        messages: each has `role`, `content` (a string), and whatever other keys the row gave it.
        tools: the schemas of the tools that the assistant may call.
        untrained: indices in `messages` of the assistant turns that are in the text but not in the loss.
        weights: the loss weight of an assistant turn's tokens, by index in `messages`, where it is not 1.
        arguments: what the row passes to the chat template by name.
        ignored: keys of the row that nothing reads.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    untrained: frozenset[int] = frozenset()
    weights: Mapping[int, float] = field(default_factory=dict[int, float])
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    ignored: tuple[str, ...] = ()

    @property
    def turns(self) -> list[int]:
        """The indices in `messages` of the assistant turns that the loss covers."""
        return [
            place
            for place, message in enumerate(self.messages)
            if message["role"] == "assistant" and place not in self.untrained
        ]


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation; the loss covers the continuation, whose tokens have the weight `weight`."""

    prompt: str
    completion: str
    ignored: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Text:
    """Plain text; the loss covers all of it, and its tokens have the weight `weight`."""

    text: str
    ignored: tuple[str, ...] = ()
    weight: float = 1.0


Record: TypeAlias = Chat | Completion | Text


def kind_of(value: object) -> str:
    """Return what a parsed JSON value is, in words."""
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


def check_text(text: str, where: str) -> None:
    """Refuse a text that contains half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(
            f"{where} contains half of a surrogate pair, which is not a character",
            "export the file again as UTF-8, or remove the broken \\ud800-\\udfff escape",
        ) from None


def check_answer(text: str, where: str, remedy: str = "write what the model should answer, or remove the row") -> None:
    """Refuse an answer, or another text to train, that is empty."""
    if not text.strip() or not text.strip(UNSEEN):
        raise RowError(f"{where} is empty", remedy)
    check_text(text, where)


def check_strings(value: Any, where: str) -> None:
    """Refuse a value that JSON does not have, or a broken string, however deeply it is nested."""
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_strings(key, where)
            check_strings(item, where)
    elif isinstance(value, list):
        for item in value:
            check_strings(item, where)
    elif isinstance(value, float) and not isfinite(value):
        raise RowError(f"{where} holds {value}, which JSON does not know", "write it as a string")
    elif value is not None and not isinstance(value, bool | int | float):
        raise RowError(f"{where} holds {kind_of(value)}, which JSON does not know", "write it as a string")
