"""JSON whose objects have each key once: if a key is repeated, parsers silently keep the last value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

KEPT = "keep one of them"
"""The remedy for a repeated key."""


class RepeatedKey(ValueError):
    """An object of a JSON text has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:80]!r} occurs twice in an object")


def parsed(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        RepeatedKey: an object has a key twice.
        json.JSONDecodeError: it is not JSON.
        ValueError: a number has too many digits.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(text)
    require_single_keys(value, text)
    return value


def require_single_keys(value: Any, text: str) -> None:
    """Refuse a text in which an object has a key twice; most texts are not parsed again for this.

    Args:
        value: the parsed text.

    Raises:
        RepeatedKey: an object has a key twice.
    """
    if text.count('":') + text.count('" :') != _count_keys(value):  # strings may contain these characters too
        json.loads(text, object_pairs_hook=_single)


def _count_keys(value: Any) -> int:
    if isinstance(value, dict):
        count = len(value)
        for item in value.values():
            if isinstance(item, dict | list):
                count += _count_keys(item)
        return count
    count = 0
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):
                count += _count_keys(item)
    return count


def _single(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise RepeatedKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return found
