"""What the footer of a Parquet file states of its columns.

pyarrow's classes for a column's metadata end the process where its statistics are damaged: the exception of C++ that
says so passes Python. Therefore the few numbers that are needed before anything is unpacked are read here.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

DEEPEST = 32
"""Structs within structs; Parquet's format has a fourth of them."""
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
"""Kinds of values in Thrift's compact protocol."""


@dataclass(frozen=True)
class StatedGroup:
    """A row group as the footer states it.

    Args:
        rows: its rows.
        columns: values and bytes once unpacked of each column.
    """

    rows: int
    columns: tuple[tuple[int, int], ...]


def stated_groups(file: BinaryIO) -> list[StatedGroup]:
    """Return what the footer of an open Parquet file states of its row groups.

    Raises:
        struct.error, IndexError, KeyError, TypeError: it is damaged.
    """
    file.seek(-8, os.SEEK_END)
    (size,) = struct.unpack("<I4x", file.read(8))
    file.seek(-8 - size, os.SEEK_END)
    footer = _Compact(file.read(size)).struct()
    return [_group(group) for group in footer[4]]


def _group(group: dict[int, Any]) -> StatedGroup:
    columns = [column[3] for column in group[1]]
    return StatedGroup(group[3], tuple((column[5], column[6]) for column in columns))


class _Compact:
    """Values in Thrift's compact protocol, one after another; a struct becomes a dict by the numbers of its fields."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _BINARY:
            return self._take(self._unsigned())
        if kind == _STRUCT and depth <= DEEPEST:
            return self.struct(depth)
        if kind in (_LIST, _SET) and depth <= DEEPEST:
            return self._list(depth)
        if kind in (_TRUE, _FALSE, _BYTE):  # a truth value of a list has a byte of its own
            return self._byte()
        if kind == _DOUBLE:
            return self._take(8)
        raise struct.error(f"a value of kind {kind} in the footer")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        size = self._unsigned() if head >> 4 == 15 else head >> 4
        return [self._value(head & 15, depth + 1) for _ in range(size)]

    def _byte(self) -> int:
        byte = self._data[self._at]
        self._at += 1
        return byte

    def _take(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._data):
            raise struct.error("the footer is cut off")
        return self._data[self._at - size : self._at]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
