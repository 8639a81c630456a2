"""What the pages made from the code share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

NOTE = "<!-- Made by `python docs/generate.py` from the code. Change the code, not this page. -->"


def refusal(parse: Callable[[Any], object], value: Any, error_type: type[Exception]) -> Any:
    """Return the error with which a value is refused."""
    try:
        parse(value)
    except error_type as error:
        return error
    raise AssertionError(f"this was to be refused: {value!r}")


def names(words: Iterable[str]) -> str:
    """Return words as code, separated by commas."""
    return ", ".join(f"`{word}`" for word in words)


def cell(text: str) -> str:
    """Return a text as a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
