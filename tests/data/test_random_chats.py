"""Chats at random, by templates with a trait each: trained as they say, or refused."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from trait_chats import chat_of, template

from onward.data.row_types import Chat, RowError
from onward.data.rows.end_tokens import without_marks

WORDS = st.text(st.sampled_from("ab \n\t\"'\\{}é<|/"), max_size=8)
TRAITS = [
    "WHOLE", "DROPS_CALLS", "CALLS_WITHOUT_CONTENT", "TEXT_ARGUMENTS", "FIRST_CALL_ONLY", "CALL_NAMES_ONLY",
    "STRIPS_THOUGHTS", "MOVES_THOUGHTS", "ASKS_TO_THINK", "NO_END", "TWO_ENDS", "CALL_END", "SYSTEM_LAST",
    "SYSTEM_AT_INFERENCE", "NO_DEVELOPER", "TWICE", "PARTS", "MARKED", "MARKS_WITHOUT_CALLS", "MARKS_QUESTIONS",
]  # fmt: skip


@st.composite
def chats(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[tuple[str, bool]]]:
    """Return a chat, and each word that it says with whether its author has it trained."""
    said: list[tuple[str, bool]] = []

    def words(is_trained: bool) -> str:
        said.append((f"W{len(said):02d}w", is_trained))
        return draw(WORDS) + said[-1][0] + draw(WORDS)

    messages: list[dict[str, Any]] = []
    for role in draw(st.sampled_from(((), ("system",), ("developer",)))):
        messages.append({"role": role, "content": words(False)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": words(False)})
        is_trained = draw(st.booleans()) or draw(st.booleans())
        answer: dict[str, Any] = {"role": "assistant", "weight": int(is_trained)}
        kind = draw(st.sampled_from(("plain", "plain", "call", "both", "thought", "think")))
        if kind in ("call", "both"):
            arguments = {"k": words(is_trained), "flag": draw(st.sampled_from((True, None, 2.5)))}
            answer["tool_calls"] = [
                {"type": "function", "function": {"name": words(is_trained).strip(), "arguments": arguments}}
            ]
        if kind == "thought":
            answer["reasoning_content"] = words(is_trained)
        head = f"<think>{words(is_trained)}</think>" if kind == "think" else ""
        answer["content"] = None if kind == "call" else head + words(is_trained)
        messages.append(answer)
        if kind in ("call", "both"):
            messages.append({"role": "tool", "content": words(False)})
            messages.append({"role": "assistant", "content": words(True)})
    return messages, said


@given(trait=st.sampled_from(TRAITS), chat=chats())
@settings(max_examples=120, deadline=None)
def test_a_chat_is_trained_as_it_says_or_refused(
    trait: str, chat: tuple[list[dict[str, Any]], list[tuple[str, bool]]]
) -> None:
    """Every word is in the text once, in the loss where its author meant it, after what inference would give."""
    messages, said = chat
    try:
        record = chat_of({"messages": messages})
        text, spans = template(trait).render(record)
    except RowError:
        return
    for word, is_trained in said:
        places = [match.start() for match in re.finditer(word, text)]
        assert 1 == len(places), word
        assert is_trained == any(start <= places[0] < end for start, end in spans), word
    assert len(record.turns) == len(spans)
    for turn, (start, end) in zip(record.turns, spans, strict=True):
        assert trait == "MARKED" or text[:start].startswith(asked_at_inference(trait, record, turn))
        assert re.search(r"<\|(im_end|end|return|call)\|>$", text[:end])


def asked_at_inference(trait: str, chat: Chat, turn: int) -> str:
    """Return the prompt for an answer, made from the chat's beginning alone."""
    made = template(trait)
    before = made._forms.messages(chat)[:turn]  # pyright: ignore[reportPrivateUsage]
    renderer = made._renderer  # pyright: ignore[reportPrivateUsage]
    assert renderer is not None
    return without_marks(renderer.render(before, prompt=True))
