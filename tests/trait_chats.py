"""Chats as templates with a trait each render them."""

from __future__ import annotations

from functools import cache
from typing import Any

import templates
from tiny import byte_state

from onward.data.row_types import Chat
from onward.data.rows.records import parse_record
from onward.data.rows.template import ChatTemplate


@cache
def template(trait: str) -> ChatTemplate:
    """Return the template of `tests/templates.py` that has a trait."""
    start = {"bos_token": "<s>"} if trait == "START_TWICE" else {}
    return ChatTemplate(byte_state(getattr(templates, trait), extra=templates.SPECIAL.get(trait, ()), **start))


def chat_of(row: dict[str, Any]) -> Chat:
    """Return the chat of a row."""
    record = parse_record(row)
    assert isinstance(record, Chat)
    return record


def pieces(trait: str, row: dict[str, Any]) -> list[str]:
    """Return the texts of the targets of a row."""
    text, spans = template(trait).render(chat_of(row))
    return [text[start:end] for start, end in spans]
