"""Values of a `.json` file, one after another, with at most one of them in memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from onward.data.files.faults import TOO_DEEP, FileError
from onward.data.files.limits import Limits
from onward.data.files.lines import not_utf8
from onward.data.strict_json import KEPT, RepeatedKey, require_single_keys

TOO_MANY_DIGITS = ("not usable JSON: a number has more digits than can be read", "write the number as a string")
"""The reason and remedy given for an integer that Python refuses to convert."""
JSON_CHUNK = 1 << 16
ESCAPED = 0xDC00
"""What `surrogateescape` adds to a byte that is not UTF-8."""


def json_values(stream: BinaryIO, limits: Limits) -> Iterator[Any]:
    """Yield the values of a top-level array, or values written one after another.

    Raises:
        FileError: the text is not JSON, or a value exceeds its limit; the error names the row.
    """
    row = 1
    try:
        for value in _JsonReader(stream, limits).values():
            yield value
            row += 1
    except FileError as error:
        raise FileError(error.reason, error.remedy, row) from None
    except json.JSONDecodeError as error:
        raise FileError(f"not valid JSON: {error.msg}", "repair the file, or write it as .jsonl", row) from None
    except UnicodeEncodeError as error:
        raise FileError(*not_utf8(ord(error.object[error.start]) - ESCAPED), row) from None
    except RecursionError:
        raise FileError(*TOO_DEEP, row) from None
    except RepeatedKey as error:
        raise FileError(str(error), KEPT, row) from None
    except ValueError:
        raise FileError(*TOO_MANY_DIGITS, row) from None


class _JsonReader:
    """Values of a top-level array, or values written one after another, with at most one of them in memory.

    ijson was tried for this: its C backend silently turns half a surrogate pair into "?" and takes memory
    quadratic in the depth of nesting.
    """

    _space = re.compile(r"[ \t\r\n]*")
    _decode = json.JSONDecoder().raw_decode

    def __init__(self, stream: BinaryIO, limits: Limits) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._limits = limits
        self._buffer = ""
        self._at = 0

    def values(self) -> Iterator[Any]:
        first = self._peek()
        if first == "[":
            yield from self._array()
        elif first == "{":
            while self._peek():
                yield self._value()
        elif first:
            self._fail("expected [ or { at the beginning")

    def _array(self) -> Iterator[Any]:
        self._at += 1
        if self._peek() != "]":
            yield self._value()
            while self._peek() == ",":
                self._at += 1
                self._peek()
                yield self._value()
        if self._peek() != "]":
            self._fail("expected , or ] after a row" if self._peek() else "the array has no end")
        self._at += 1
        if self._peek():
            self._fail("text after the end of the array")

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self._more():
                    raise
            else:
                if end < len(self._buffer) or not self._more():
                    text = self._buffer[self._at : end]
                    text.encode()  # fails where a byte is not UTF-8; decoding would, but many rows ahead of that one
                    require_single_keys(value, text)
                    self._at = end
                    return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether the error may only mean that the buffer ends inside the value."""
        longest_literal = len("-Infinity")
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - longest_literal

    def _peek(self) -> str:
        """Skip white space; return the next character, "" at the end of the file."""
        while True:
            match = self._space.match(self._buffer, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        rest = self._buffer[self._at :]
        room = self._limits.row_bytes - len(rest)
        if room < 0 or self._limits.is_too_large(rest):
            raise self._limits.row_refusal("the row")
        # doubling: a long row is parsed a few times, not many
        chunk = self._text.read(min(max(JSON_CHUNK, len(rest)), room + 1))
        self._buffer, self._at = rest + chunk, 0
        return bool(chunk)

    def _fail(self, message: str) -> None:
        raise json.JSONDecodeError(message, "", 0)
