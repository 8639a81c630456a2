"""The proof of one chat: everything its messages say is in the rendered text, in place, and in the loss where meant.

The place of each piece is found by rendering the chat with unique words in place of the pieces: the text must be that
skeleton with the words replaced. An answer's targets begin where the prompt that inference would have ends, which must
be the beginning of the text, and end with the token at which inference stops.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from onward.data.row_types import Message, RowError
from onward.data.rows.probes import ARGUMENT, CONTENT, NAME, REASONING, Placed, Probe, Slot

Render: TypeAlias = Callable[[Sequence[Message]], str]

REMEDY = (
    "use a chat template that does: the config key chat_template: FILE, or onward init NEW --set chat_template=FILE if "
    "the run has trained"
)
SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Layout:
    """A rendered chat, and where everything its messages say is in it.

    Args:
        text: the rendered chat.
        placed: the pieces, each once, in the order of the text, which is that of the messages.
    """

    text: str
    placed: list[Placed]

    def of(self, place: int) -> list[Placed]:
        """Return the pieces of one message."""
        return self._by_place.get(place, [])

    def within(self, start: int, end: int) -> list[Placed]:
        """Return the pieces of which any part is in a range of the text."""
        return self.placed[self.count_before(start) : bisect_left(self.placed, end, key=_start_of)]

    def count_before(self, at: int) -> int:
        """Return how many pieces end before a place in the text, or at it."""
        return bisect_right(self.placed, at, key=_end_of)

    def start_after(self, place: int) -> int:
        """Return where the first piece of any later message starts; the end of the text if there is none."""
        return next((piece.start for piece in self.placed if piece.slot.place > place), len(self.text))

    @cached_property
    def _by_place(self) -> dict[int, list[Placed]]:
        found: defaultdict[int, list[Placed]] = defaultdict(list)
        for piece in self.placed:
            found[piece.slot.place].append(piece)
        return dict(found)


def _start_of(piece: Placed) -> int:
    return piece.start


def _end_of(piece: Placed) -> int:
    return piece.end


def lay_out(messages: Sequence[Message], text: str, render: Render, marks: Sequence[str]) -> Layout:
    """Return where everything the messages say is in the text that they render to.

    Args:
        messages: the messages as the template gets them.
        text: the text that they render to.
        render: renders other messages with everything else in the row unchanged.
        marks: pieces of text whose presence may change how the template renders.

    Raises:
        RowError: a piece is missing, changed, repeated or out of place.
    """
    found = [mark for mark in marks if any(_holds(message, mark) for message in messages)]
    pattern = re.compile("|".join(map(re.escape, found))) if found else None
    refusal: RowError | None = None
    ways = [(None, True), (pattern, False)] if pattern else [(None, True)]
    if any(message.get("tool_calls") for message in messages):
        ways.insert(1, (None, False))
    for kept, deep in ways:
        probe = Probe(messages, text, kept, deep=deep)
        try:
            skeleton = render(probe.messages)
        except RowError:
            continue
        pieces = probe.place(skeleton, text)
        if pieces is None:
            continue
        try:
            layout = _checked(probe, pieces, text)
            _check_marks(layout, messages)
            _check_shallow(layout, messages, deep=deep)
        except RowError as error:
            refusal = refusal or error
            continue
        return layout
    raise refusal or _changed(messages, text)


def require_asked(messages: Sequence[Message], text: str, render: Render) -> None:
    """Refuse messages if the prompt that they render to leaves out a text or a call.

    It may leave out what the assistant thought and said: templates drop earlier thoughts, and texts beside calls.

    Args:
        messages: the messages as the template gets them.
        text: the prompt.
        render: renders the prompt of other messages.

    Raises:
        RowError: a text or a call is missing.
    """
    probe = Probe(messages, text, None, deep=False)
    try:
        skeleton = render(probe.messages)
    except RowError:  # the template depends on what the messages say
        return
    for slot in probe.left_out(skeleton):
        if slot.kind == NAME or (slot.kind == CONTENT and messages[slot.place]["role"] != "assistant"):
            raise _refusal("does not write", slot.place, slot.kind, messages)


def _holds(message: Message, mark: str) -> bool:
    said = [message.get("content"), *(message.get(key) for key in ("reasoning_content", "thinking", "reasoning"))]
    return any(isinstance(value, str) and mark in value for value in said)


def _checked(probe: Probe, pieces: Sequence[Placed], text: str) -> Layout:
    """Return the layout after checking that all pieces are there, once each, in the order of their messages."""
    placed: list[Placed] = []
    seen: set[int] = set()
    at = 0
    for piece in pieces:
        known = id(piece.slot) in seen
        if known and piece.slot.kind == NAME:  # templates repeat it with the result of a call
            continue
        if known:
            raise _refusal("writes", piece.slot.place, piece.slot.kind, probe.messages, "twice")
        if piece.slot.place < at:
            raise _refusal("writes", piece.slot.place, piece.slot.kind, probe.messages, "after a later message")
        seen.add(id(piece.slot))
        at = piece.slot.place
        placed.append(piece)
    for slot in probe.slots:
        if id(slot) not in seen:
            does = "leaves out a part of" if slot.before.strip() or _has_siblings(probe, slot) else "does not write"
            raise _refusal(does, slot.place, slot.kind, probe.messages)
    written = {piece.slot.place for piece in placed}
    for place, message in enumerate(probe.messages):
        if message["content"] and place not in written and _text_of(message).strip():
            raise _refusal("does not write", place, CONTENT, probe.messages)
    return Layout(text, placed)


def _has_siblings(probe: Probe, slot: Slot) -> bool:
    own = [other for other in probe.slots if (other.place, other.kind) == (slot.place, slot.kind)]
    return slot.kind in (CONTENT, REASONING) and len(own) > 1


def _check_marks(layout: Layout, messages: Sequence[Message]) -> None:
    """Refuse a text in which marks inside what a message says were removed, moved or added."""
    behind: Placed | None = None
    for piece in layout.placed:
        slot = piece.slot
        if slot.kind not in (CONTENT, REASONING):
            continue
        before, after = _squeezed(slot.before), _squeezed(slot.after)
        if behind is not None and (behind.slot.place, behind.slot.kind) == (slot.place, slot.kind):
            is_kept = _squeezed(layout.text[behind.end : piece.start]) == before
        else:
            is_kept = _ends_with(layout.text, piece.start, before)
        if not is_kept or not _begins_with(layout.text, piece.end, after):
            raise _refusal("changes", slot.place, slot.kind, messages)
        behind = piece


def _check_shallow(layout: Layout, messages: Sequence[Message], *, deep: bool) -> None:
    """Refuse calls some of whose keys, booleans and nulls are not written, if these were not replaced by words."""
    if deep:
        return
    for place, message in enumerate(messages):
        pieces = layout.of(place)
        for call in message.get("tool_calls") or ():
            written = layout.text[pieces[0].start : layout.start_after(place)] if pieces else ""
            for word in _fixed(call["function"]["arguments"]):
                if word not in written and word.capitalize() not in written:
                    raise _refusal("does not write", place, ARGUMENT, messages)


def _fixed(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for key, item in value.items() for word in (str(key), *_fixed(item))]
    if isinstance(value, list):
        return [word for item in value for word in _fixed(item)]
    if value is None or isinstance(value, bool):
        return [{None: "null", True: "true", False: "false"}[value]]
    return []


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def _squeezed(text: str) -> str:
    return SPACE.sub("", text)


def _ends_with(text: str, end: int, squeezed: str) -> bool:
    """Whether a text ends with another at a place, white space aside; no more of it is looked at than that takes."""
    size = len(squeezed)
    while len(found := _squeezed(text[max(0, end - size) : end])) < len(squeezed) and size < end:
        size *= 2
    return found.endswith(squeezed)


def _begins_with(text: str, start: int, squeezed: str) -> bool:
    """Whether a text begins with another at a place, white space aside."""
    size = len(squeezed)
    while len(found := _squeezed(text[start : start + size])) < len(squeezed) and start + size < len(text):
        size *= 2
    return found.startswith(squeezed)


def _changed(messages: Sequence[Message], text: str) -> RowError:
    for place, message in enumerate(messages):
        if _text_of(message).strip() not in text:
            return _refusal("changes or cuts", place, CONTENT, messages)
    return RowError("the chat template does not write the messages as they are", REMEDY)


def _refusal(does: str, place: int, kind: str, messages: Sequence[Message], how: str = "") -> RowError:
    role = messages[place]["role"]
    what = {
        CONTENT: "the answer" if role == "assistant" else f"the {role} text",
        REASONING: "the reasoning",
        NAME: "the tool call",
        ARGUMENT: "the arguments of the tool call",
    }[kind]
    key = {REASONING: " (reasoning_content)", NAME: " (tool_calls)", ARGUMENT: " (tool_calls)"}.get(kind, "")
    return RowError(f"the chat template {does} {what} of message {place + 1}{key}{' ' if how else ''}{how}", REMEDY)
