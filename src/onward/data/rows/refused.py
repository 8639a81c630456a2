"""Refuses rows that are something other than a text to learn, and says what they are."""

from __future__ import annotations

import json
import re
from typing import Any

from onward.data.row_types import KEY_LENGTH, RowError
from onward.data.rows.columns import BY_COLUMNS, refuse_by_columns
from onward.data.rows.messages import MEDIA_KEYS, weight_of
from onward.text import printable

PREFERENCE_KEYS = (
    "chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages", "preferred_output",
    "non_preferred_output",
)  # fmt: skip
SEVERAL = ("completions", "responses", "answers", "outputs", "generations", "candidates")
"""Keys that hold several answers to one question."""
ONE_OF_SEVERAL = re.compile(r"(answer|completion|output|response)_?(\d|[abjk])")
"""Keys that each hold one of several answers."""
TOKEN_KEYS = ("input_ids", "token_ids", "tokens")
LABEL_KEYS = ("label", "kto_tag")
SPEAKERS = frozenset(("role", "from", "speaker"))
"""Keys of the turns of a chat: a list of these is one row of an unknown format, and so is Axolotl's `segments`."""
ONE_ANSWER = 'keep the good answer as "messages" or "completion", and remove the other'


def refuse_known(row: dict[str, Any]) -> None:
    """Refuse preferences, answers labelled as bad, images and sound, token ids, and tables stored by columns.

    Raises:
        RowError: the row, whatever format it has, is one of these.
    """
    for key in PREFERENCE_KEYS:
        if key in row:
            raise RowError(f'the row has "{key}": Onward does not train on preferences', ONE_ANSWER)
    for key in LABEL_KEYS:
        if _is_bad(row[key], row) if key in row else False:
            raise RowError(f'"{key}" is {json.dumps(row[key])}: the answer is labelled as bad', "remove the row")
    for key in MEDIA_KEYS:
        if row.get(key):
            raise RowError(f'the row has "{key}": only text is trained', f'remove the row, or its "{key}"')
    if "input_ids" in row:
        refuse_tokens(row)
    if not isinstance(next(iter(row.values())), str):
        refuse_by_columns(row)


def refuse_tokens(row: dict[str, Any]) -> None:
    """Refuse a row that is tokenized already."""
    for key in TOKEN_KEYS:
        if isinstance(row.get(key), list):
            raise RowError(
                f'the row has "{key}": it is already tokenized',
                "give the text instead: Onward tokenizes it for the model",
            )


def refuse_shapes(row: dict[str, Any]) -> None:
    """Refuse a row without a known format that has several answers, or that contains the actual rows."""
    several = [key for key in SEVERAL if isinstance(row.get(key), list | dict)]
    several = several or [key for key in row if ONE_OF_SEVERAL.fullmatch(key)]
    if several:
        named = ", ".join(f'"{key}"' for key in several)
        raise RowError(
            f"the row has several answers ({named}): Onward trains one answer, and no preferences", ONE_ANSWER
        )
    if {"columns", "data"} <= row.keys():
        raise BY_COLUMNS
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1 and lists[0] != "segments" and SPEAKERS.isdisjoint(row[lists[0]][0]):
        name = printable(lists[0][:KEY_LENGTH])
        raise RowError(
            f'no known row format; "{name}" contains a list of objects, which may be the rows',
            f'write what "{name}" holds into a .json file, without the object around it',
        )


def _is_bad(label: Any, row: dict[str, Any]) -> bool:
    """Return whether a label calls an answer bad; the number 0 next to a plain text is its class."""
    weight = weight_of(label)
    is_word = isinstance(label, str) and label.strip().isalpha()
    return label is False or (weight == 0 and (is_word or "text" not in row))
