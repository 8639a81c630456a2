"""Limits on what a training file may grow to while it is read; each refusal names the key that raises its limit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onward.data.files.faults import FileError

if TYPE_CHECKING:
    from onward.config import Config

RATIO_FLOOR = 16 << 20
"""Unpacked bytes up to which the ratio is not checked."""

VALUE_BYTES = 16
"""Bytes that each JSON value adds to the size of its row besides its text: values of one character take memory too."""

_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """What a training file may grow to.

    Args:
        row_bytes: bytes of a row, both in the file and as it is tokenized.
        unpacked_bytes: bytes of a compressed or Parquet file once unpacked.
        ratio: unpacked bytes per byte of such a file; checked above 16 MiB.
    """

    row_bytes: int = 16 << 20
    unpacked_bytes: int = 65536 << 20
    ratio: int = 200

    @classmethod
    def of(cls, config: Config) -> Limits:
        """Return the limits that a config sets."""
        return cls(config.max_row_mb << 20, config.max_unpacked_mb << 20, config.max_unpack_ratio)

    def check_unpacked(self, unpacked: int, packed: int) -> None:
        """Refuse a file if it is too much that `packed` of its bytes unpacked to `unpacked` bytes.

        Raises:
            FileError: the size or the ratio exceeds its limit.
        """
        if unpacked > self.unpacked_bytes:
            raise FileError(
                f"it unpacks to more than {in_mib(self.unpacked_bytes)}",
                "split the file, or raise max_unpacked_mb",
            )
        if unpacked > max(RATIO_FLOOR, self.ratio * packed):
            raise FileError(
                f"it unpacks to more than {self.ratio} times its size",
                "if this is intended, raise max_unpack_ratio or add the file uncompressed",
            )

    def is_too_large(self, json_text: str) -> bool:
        """Return whether a JSON text exceeds the limit for a row, including `VALUE_BYTES` for each value."""
        shortest_value = 2  # characters: "1,"
        if len(json_text) * (1 + VALUE_BYTES // shortest_value) <= self.row_bytes:
            return False
        outside = _STRING.sub("", json_text)
        values = outside.count(",") + outside.count("[") + outside.count("{")
        return len(json_text) + VALUE_BYTES * values > self.row_bytes

    def row_refusal(self, what: str, line: int | None = None) -> FileError:
        """Return the refusal of a row, or of what contains it, that exceeds the limit."""
        return FileError(
            f"{what} is larger than {in_mib(self.row_bytes)}", "split it into several rows, or raise max_row_mb", line
        )


DEFAULT_LIMITS = Limits()
"""The limits of a config that sets none."""


NO_LIMITS = Limits(row_bytes=1 << 60, unpacked_bytes=1 << 60, ratio=1 << 60)
"""For files that were already accepted: they are not checked again."""


def in_mib(size: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} bytes"
