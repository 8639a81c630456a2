"""Finds where a template puts what messages say: the texts are replaced by unique words, which are then looked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onward.data.row_types import Message
from onward.data.rows.messages import REASONING_KEYS

CONTENT, REASONING, NAME, ARGUMENT = "content", "reasoning", "name", "argument"


@dataclass(frozen=True)
class Slot:
    """A piece of what a message says.

    Args:
        place: the index of the message in the chat.
        kind: what the piece belongs to: content, reasoning, name or argument.
        forms: the ways in which a template may write it.
        before: the text between the previous piece of the content or the reasoning and this one.
        after: the text after the last piece of a content or a reasoning; "" for any other piece.
    """

    place: int
    kind: str
    forms: tuple[str, ...]
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Placed:
    """A slot and its character range [start, end) in the rendered text."""

    slot: Slot
    start: int
    end: int


class Probe:
    """The messages of a chat with unique words in place of what they say.

    Args:
        messages: the messages, as the template gets them.
        text: what they render to; the words do not occur in it.
        marks: pieces of content and reasoning that are left as they are; None if everything is replaced.
        deep: whether keys, booleans and nulls of arguments are replaced too.
    """

    def __init__(self, messages: Sequence[Message], text: str, marks: re.Pattern[str] | None, *, deep: bool) -> None:
        self.slots: list[Slot] = []
        self._marks = marks
        self._deep = deep
        self._letters = _unused(lambda number: f"onwardProbe{number}x", text)
        self._digits = _unused(lambda number: str(90817263 + number), text)
        self._find = re.compile(rf"{self._letters}(\d{{6}})End|{self._digits}(\d{{6}})")
        self.messages = [self._message(place, message) for place, message in enumerate(messages)]

    def place(self, skeleton: str, text: str) -> list[Placed] | None:
        """Return where the slots are if `text` is the skeleton with its words replaced by them, else None.

        Args:
            skeleton: the text that `messages` render to.
        """
        words = list(self._find.finditer(skeleton))
        bounds = [0, *(place for word in words for place in word.span()), len(skeleton)]
        pieces = [skeleton[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
        slots = [self.slots[int(word[1] or word[2])] for word in words]
        if not text.startswith(pieces[0]):
            return None
        steps: list[dict[int, tuple[int, int]]] = []
        reached = [len(pieces[0])]
        for slot, piece in zip(slots, pieces[1:], strict=True):
            step: dict[int, tuple[int, int]] = {}
            for start in reached:
                for form in slot.forms:
                    end = start + len(form)
                    if text.startswith(form, start) and text.startswith(piece, end):
                        step.setdefault(end + len(piece), (start, end))
            steps.append(step)
            reached = list(step)
        if len(text) not in reached:
            return None
        return _walked_back(slots, steps, len(text))

    def left_out(self, skeleton: str) -> list[Slot]:
        """Return the slots whose words are not in the text that `messages` render to."""
        written = {int(word[1] or word[2]) for word in self._find.finditer(skeleton)}
        return [slot for number, slot in enumerate(self.slots) if number not in written]

    def _message(self, place: int, message: Message) -> Message:
        made = dict(message)
        written = [key for key in REASONING_KEYS if isinstance(message.get(key), str)]
        if written:
            made |= dict.fromkeys(written, self._text(place, REASONING, message[written[0]]))
        if isinstance(message["content"], str):
            made["content"] = self._text(place, CONTENT, message["content"])
        elif isinstance(message["content"], list):
            made["content"] = [
                {**part, "text": self._text(place, CONTENT, part["text"])} for part in message["content"]
            ]
        if message.get("tool_calls"):
            made["tool_calls"] = [self._call(place, call) for call in message["tool_calls"]]
        return made

    def _call(self, place: int, call: Message) -> Message:
        function = call["function"]
        made = {**function, "name": self._word(place, NAME, function["name"])}
        arguments = function["arguments"]
        if isinstance(arguments, str):
            made["arguments"] = self._add(Slot(place, ARGUMENT, (arguments,)))
        else:
            made["arguments"] = self._value(place, arguments)
        return {**call, "function": made}

    def _value(self, place: int, value: Any) -> Any:
        if isinstance(value, dict):
            ordered = sorted(value, key=str.lower) if self._deep else []  # words sort like the keys they replace
            keys = {key: self._word(place, ARGUMENT, key) for key in ordered}
            return {keys.get(key, key): self._value(place, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._value(place, item) for item in value]
        if isinstance(value, str):
            return self._word(place, ARGUMENT, value) if value.strip() else value
        if (value is None or isinstance(value, bool)) and not self._deep:
            return value
        forms = tuple(dict.fromkeys((json.dumps(value), str(value))))
        return int(self._digits + self._add(Slot(place, ARGUMENT, forms))[-9:-3])

    def _word(self, place: int, kind: str, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        at = text.index(core)
        return text[:at] + self._add(Slot(place, kind, _forms(core))) + text[at + len(core) :]

    def _text(self, place: int, kind: str, text: str) -> str:
        """Return a text with words in place of its pieces; white space and marks stay."""
        marks = [mark.span() for mark in self._marks.finditer(text)] if self._marks else []
        bounds = [0, *(place for mark in marks for place in mark), len(text)]
        pieces: list[tuple[int, int]] = []
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            core = text[start:end].strip()
            if core:
                at = text.index(core, start, end)
                pieces.append((at, at + len(core)))
        made, behind = "", 0
        for number, (start, end) in enumerate(pieces, start=1):
            core, before = text[start:end], text[behind:start]
            after = text[end:] if number == len(pieces) else ""
            made += before + self._add(Slot(place, kind, _forms(core), before, after))
            behind = end
        return made + text[behind:]

    def _add(self, slot: Slot) -> str:
        self.slots.append(slot)
        return f"{self._letters}{len(self.slots) - 1:06d}End"


def _walked_back(slots: Sequence[Slot], steps: Sequence[dict[int, tuple[int, int]]], reached: int) -> list[Placed]:
    placed: list[Placed] = []
    for slot, step in zip(reversed(slots), reversed(steps), strict=True):
        start, end = step[reached]
        placed.append(Placed(slot, start, end))
        reached = start
    return placed[::-1]


def _unused(make: Callable[[int], str], text: str) -> str:
    number = 0
    while make(number) in text:
        number += 1
    return make(number)


def _forms(core: str) -> tuple[str, ...]:
    """Return the ways in which a template may write a text: as it is, or escaped as in JSON or Python."""
    escaped = (json.dumps(core, ensure_ascii=False)[1:-1], json.dumps(core)[1:-1], repr(core)[1:-1])
    return tuple(dict.fromkeys((core, *escaped)))
