"""The targets of a chat: for each answer in the loss, from the end of the inference prompt to the stop token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from onward.data.row_types import Message, RowError
from onward.data.rows.end_tokens import EndTokens
from onward.data.rows.proof import REMEDY, Layout

Span: TypeAlias = tuple[int, int]

THINK_START, THINK_END = "<think>", "</think>"


class Renders(Protocol):
    """Renders messages with everything else in a row unchanged."""

    def __call__(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Return the text of messages; with `prompt`, as inference asks for the next answer."""
        ...


@dataclass(frozen=True)
class Target:
    """A range of characters that the model has to produce, and the index of the message that it belongs to."""

    place: int
    start: int
    end: int


@dataclass(frozen=True)
class Habits:
    """How a template writes turns.

    Args:
        ends: what it writes after an answer.
        special_tokens: every special token.
        prompt: the generation prompt; "" if there is none, or none with a special token.
        header: what it writes before an answer if it has no generation prompt.
    """

    ends: EndTokens
    special_tokens: Sequence[str]
    prompt: str
    header: str


class Turns:
    """The turns of one rendered chat.

    Args:
        layout: the text, and where in it everything is that the messages say.
        messages: the messages, as the template gets them.
        render: renders other messages with everything else in the row unchanged.
        habits: how the template writes turns.
    """

    def __init__(self, layout: Layout, messages: Sequence[Message], render: Renders, habits: Habits) -> None:
        self._layout = layout
        self._text = layout.text
        self._messages = messages
        self._render = render
        self._habits = habits

    def found(self, turns: Sequence[int]) -> list[Target]:
        """Return the targets of answers, found by the inference prompts and the end tokens.

        Args:
            turns: the places of the answers.

        Raises:
            RowError: the text before an answer is not what inference would give, or the end token is missing.
        """
        targets: list[Target] = []
        for place in turns:
            start = self._start(place)
            target = Target(place, start, self._end(place))
            self._check(target)
            targets.append(target)
        return targets

    def marked(self, turns: Sequence[int], spans: Sequence[Span]) -> list[Target]:
        """Return the targets of answers that the template's own marks enclose.

        Args:
            turns: the places of the answers.
            spans: the marked ranges.

        Raises:
            RowError: the marks leave out a part of an answer or its end token, or enclose something else.
        """
        targets = [self._of_mark(span) for span in spans]
        for place in turns:
            self._check_whole(place, self._start(place))
            own = [target for target in targets if target.place == place]
            for piece in self._layout.of(place):
                if not any(target.start <= piece.start and piece.end <= target.end for target in own):
                    raise RowError(
                        f"the chat template's {{% generation %}} markers leave out a part of message {place + 1}",
                        REMEDY,
                    )
            if not self._has_end_token(place, own):
                raise self._no_end(place)
        return _joined([target for target in targets if target.place in turns])

    def _start(self, place: int) -> int:
        """Return where the inference prompt for an answer ends."""
        first = min(piece.start for piece in self._layout.of(place))
        prompt = self._prompt(place, first)
        given = len(prompt) - first  # characters of the answer that are already in the prompt: `<think>`
        if not self._text.startswith(prompt) or given > len(self._habits.prompt):
            others = sum(message["role"] == "assistant" for message in self._messages) > 1
            raise RowError(
                f"the text before the answer of message {place + 1} is not what the model gets at inference: "
                "the chat template renders the beginning of the chat differently",
                f"{REMEDY}, or give the answer the weight 0" if others else REMEDY,
            )
        header = self._habits.header
        return len(prompt) + (len(header) if self._text.startswith(header, len(prompt)) else 0)

    def _prompt(self, place: int, first: int) -> str:
        try:
            return self._render(self._messages[:place], prompt=True)
        except RowError as error:
            written = self._habits.prompt  # only the template's own text can precede the first message
            if place == 0 and written and written in self._text[:first]:
                return self._text[: self._text.rfind(written, 0, first) + len(written)]
            raise RowError(f"at inference, before message {place + 1}, {error.reason}", error.remedy) from error

    def _end(self, place: int) -> int:
        """Return where the end token of an answer ends."""
        last = max(piece.end for piece in self._layout.of(place))
        is_last = place + 1 == len(self._messages)
        token = self._habits.ends.of(is_last=is_last)
        if token and self._text.startswith(token, last):
            return last + len(token)
        limit, is_whole = self._limit(place)
        at = self._text.find(token, last, limit) if token else -1
        if at >= 0:
            return at + len(token)
        if is_whole and self._messages[place].get("tool_calls"):
            return self._end_of_call(place, last, limit)
        raise self._no_end(place)

    def _end_of_call(self, place: int, last: int, limit: int) -> int:
        """Return where an answer that calls a tool ends, if that has an end token of its own (gpt-oss, Gemma 4).

        A token at the end of the message is not that token if it is written once per call.
        """
        end = last + len(self._text[last:limit].rstrip())
        token = next((token for token in self._habits.special_tokens if self._text.endswith(token, last, end)), "")
        message = self._messages[place]
        twice = {**message, "tool_calls": [*message["tool_calls"], *message["tool_calls"]]}
        try:
            more = self._render([*self._messages[:place], twice])
        except RowError:  # the template takes only one call at a time
            more = ""
        if not token or more.count(token) > self._text[:limit].count(token):
            raise self._no_end(place)
        return end

    def _limit(self, place: int) -> tuple[int, bool]:
        """Return the last place where a message can end, and whether it is known to end there."""
        if place + 1 == len(self._messages):
            return len(self._text), True
        try:
            rendered = self._render(self._messages[: place + 1])
        except RowError:
            rendered = None
        if rendered is not None and self._text.startswith(rendered):
            return len(rendered), True
        return self._layout.start_after(place), False

    def _first_special(self, start: int, limit: int) -> int | None:
        """Return where the first special token of a range ends; None if there is none."""
        text = self._text[start:limit]
        found = [(at, -len(token)) for token in self._habits.special_tokens if (at := text.find(token)) >= 0]
        if not found:
            return None
        at, length = min(found)
        return start + at - length

    def _no_end(self, place: int) -> RowError:
        return RowError(
            f"the chat template writes no end token right after the answer of message {place + 1}, or leaves it out of "
            "the loss: the model would not learn to stop",
            REMEDY,
        )

    def _check(self, target: Target) -> None:
        """Refuse a target that contains what another message says, or an answer inside a thought."""
        if any(piece.slot.place != target.place for piece in self._layout.within(target.start, target.end)):
            raise RowError(f"the chat template writes more than the answer where message {target.place + 1} is", REMEDY)
        self._check_whole(target.place, target.start)

    def _check_whole(self, place: int, start: int) -> None:
        """Refuse an answer that the template splits into a thought and the rest, if its author did not."""
        message = self._messages[place]
        before = self._text[start : self._layout.of(place)[0].start]
        thinks = message.get("reasoning_content") or _said(message).lstrip().startswith(THINK_START)
        if not thinks and before.count(THINK_START) > before.count(THINK_END):
            raise RowError(
                f"the chat template splits the answer of message {place + 1} at {THINK_END!r}",
                f'write the thought as "reasoning_content", or put {THINK_START!r} before it',
            )

    def _of_mark(self, span: Span) -> Target:
        """Return a marked range, cut right after the end token, as the target of its message."""
        start, end = span
        inside = {piece.slot.place for piece in self._layout.within(start, end)}
        place = inside.pop() if len(inside) == 1 else -1 if inside else self._owner(start)
        if place < 0 or self._messages[place]["role"] != "assistant":
            raise RowError("the chat template's {% generation %} markers enclose more than an answer", REMEDY)
        token = self._habits.ends.of(is_last=place + 1 == len(self._messages)) or self._habits.ends.last
        whole = self._text[start:end].rstrip()
        if token and whole.endswith(token):
            return Target(place, start, start + len(whole))
        if token and self._text.startswith(token, end):
            return Target(place, start, end + len(token))
        return Target(place, start, end)

    def _owner(self, start: int) -> int:
        """Return the index of the answer that a range without any text of a message belongs to; -1 if there is none.

        Args:
            start: where the range begins.
        """
        placed, behind = self._layout.placed, self._layout.count_before(start)
        first = placed[behind - 1].slot.place if behind else 0
        last = placed[behind].slot.place if behind < len(placed) else len(self._messages) - 1
        places = (place for place in range(first, last + 1) if self._messages[place]["role"] == "assistant")
        return next(places, -1)

    def _has_end_token(self, place: int, own: Sequence[Target]) -> bool:
        last = max(piece.end for piece in self._layout.of(place))
        end = max((target.end for target in own), default=0)
        return self._first_special(last, end) is not None


def _joined(targets: Sequence[Target]) -> list[Target]:
    """Merge overlapping targets."""
    joined: list[Target] = []
    for target in targets:
        if joined and target.start < joined[-1].end:
            joined[-1] = Target(target.place, joined[-1].start, max(target.end, joined[-1].end))
        else:
            joined.append(target)
    return joined


def _said(message: Message) -> str:
    return message["content"] or ""
