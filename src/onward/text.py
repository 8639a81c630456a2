"""Text for people. What comes from others is made safe: it can neither move the cursor nor end a quotation."""

from __future__ import annotations

import math
import shlex
import sys
import unicodedata
from pathlib import PurePath
from typing import Any, cast

JOINERS = "\u200c\u200d"
"""Format characters of ordinary writing: Persian, the languages of India and emoji need them."""


def without_module(error: ImportError) -> str | None:
    """Return in words that Python itself lacks a part, as where it was built without a library; None for any other."""
    if (error.name or "").partition(".")[0] not in sys.stdlib_module_names:
        return None
    name = str(error.name).lstrip("_")
    return (
        f"this Python lacks its module {name} [{sys.executable}]\n  It was built without a library that the module "
        "needs: install that library with its headers and build Python again, or take the system's Python."
    )


def printable(text: str) -> str:
    """Return `text` with an escape for every character that a terminal obeys or does not show.

    Those are control characters (including line ends), the start of escape sequences, marks that change the direction
    of writing, lone surrogates and noncharacters. All other Unicode stays as it is.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def storable(text: str) -> str:
    """Return `text` with an escape for what no ledger and no file in UTF-8 can hold: a surrogate, from other bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def quoted(word: object) -> str:
    """Return `word`, a path or another text, as one word of a shell command that is safe to print and to paste.

    A name that is not printable is written as `$'...'`, which bash, zsh and every shell of POSIX 2024 read. A path that
    begins with a dash gets `./` in front, since commands would otherwise take it for an option.
    """
    text = str(word)
    if isinstance(word, PurePath) and text.startswith("-"):
        text = f"./{text}"
    if printable(text) == text:
        return shlex.quote(text)
    return "$'" + "".join(map(_in_ansi_quotes, text)) + "'"


def finite(value: Any) -> Any:
    """Return a JSON value with null for numbers that are not finite, for which JSON has no words."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def how_many(count: int, noun: str) -> str:
    """Return a count with a noun whose plural ends in `s`: `1 row`, `2 rows`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def size(count: float) -> str:
    """Return a number of bytes in decimal units, with at most three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def _shown(character: str) -> str:
    return character if _is_shown(character) else character.encode("unicode_escape").decode("ascii")


def _in_ansi_quotes(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if _is_shown(character):
        return character
    # octal: the shells agree on three digits, but not on where a hexadecimal escape ends
    return "".join(f"\\{byte:03o}" for byte in _bytes_of(character))


def _bytes_of(character: str) -> bytes:
    """Return the file system's bytes for a character: Python reads bytes that are not UTF-8 as surrogates."""
    try:
        return character.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that no file name contains
        return character.encode("utf-8", "surrogatepass")
