"""A tokenized file on disk: memory-mapped arrays, of which a step reads only its own rows.

tokens.bin   little-endian uint32, all rows one after another: the top bit marks a target, seven more number its weight
offsets.bin  little-endian int64, rows + 1: row i is tokens[offsets[i]:offsets[i + 1]]
lines.bin    little-endian int64, rows: the source line of each row
meta.json    counts, the settings it was made with, weights other than 1 by number, size and xxh3 of the three files,
             and its own xxh3
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from onward.atomic import TEMPORARY_PREFIX, is_own_folder, remove_tree
from onward.data.row_types import RowError
from onward.digest import canonical_json, sha256_json, xxh3_file
from onward.errors import DamagedState, Unreadable
from onward.stated import NO_SUCH_FILE

FORMAT, WEIGHED_FORMAT = 1, 2
"""Formats of files whose targets all have the weight 1, and of other files."""
TARGET_BIT = np.uint32(1 << 31)
WEIGHT_SHIFT, MOST_WEIGHTS = 24, 127
ID_BITS = np.uint32((1 << WEIGHT_SHIFT) - 1)
"""The bits of a token's id: no vocabulary has 16 million tokens."""
DTYPES = {"tokens.bin": "<u4", "offsets.bin": "<i8", "lines.bin": "<i8"}
META = "meta.json"
CHECK = "xxh3"
"""The key of meta.json with the xxh3 of everything else in it; earlier releases wrote none."""
HINT = "remove this directory: it is a cache that is rebuilt from the archived file"

PackedRow = NDArray[np.uint32]


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        ids: token ids, int64, shape (T,).
        targets: which tokens the loss covers, bool, shape (T,); never the first, which nothing predicts.
        weights: the weight of each target in the loss, float32, shape (T,); None if each has weight 1.
    """

    ids: NDArray[np.int64]
    targets: NDArray[np.bool_]
    weights: NDArray[np.float32] | None = None


class Weights:
    """The weights other than 1 that targets of one file have, numbered from 1."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def number(self, weight: float) -> int:
        """Return the number of a weight.

        Raises:
            RowError: the file has too many different weights.
        """
        if weight not in self.values:
            if len(self.values) == MOST_WEIGHTS:
                raise RowError(f"the file has more than {MOST_WEIGHTS} different weights", "round them")
            self.values.append(weight)
        return self.values.index(weight) + 1

    @property
    def notes(self) -> list[str]:
        """Return what is reported of them when the file is accepted."""
        said = ", ".join(f"{value:g}" for value in self.values)
        return [f"weights of tokens in the loss, besides 1: {said}"] if said else []

    def facts(self) -> dict[str, Any]:
        """Return what the file's meta.json says of them; nothing if all targets have the weight 1."""
        return {"format": WEIGHED_FORMAT, "weights": self.values} if self.values else {}


def pack(ids: NDArray[Any], targets: NDArray[np.bool_]) -> PackedRow:
    """Return ids, shape (T,), and targets, bool, shape (T,), as the uint32 values that `tokens.bin` holds."""
    return np.where(targets, ids.astype(np.uint32) | TARGET_BIT, ids.astype(np.uint32))


def ids_of(packed: PackedRow) -> PackedRow:
    """Return the ids of packed tokens, uint32, shape (T,)."""
    return packed & ID_BITS


def weighed(packed: PackedRow, chosen: NDArray[np.bool_], number: int) -> PackedRow:
    """Return packed tokens in which the chosen ones, bool, shape (T,), have the weight with this number."""
    return np.where(chosen, packed | np.uint32(number << WEIGHT_SHIFT), packed)


def unpack(packed: PackedRow, weights: NDArray[np.float32] | None = None) -> Row:
    """Return the row that `pack` packed.

    Args:
        weights: the weight by number, that of number 0 being 1; None if each target has the weight 1.
    """
    ids, targets = ids_of(packed).astype(np.int64), packed >= TARGET_BIT
    numbers = (packed & ~TARGET_BIT) >> np.uint32(WEIGHT_SHIFT)
    return Row(ids, targets, None if weights is None or not numbers.any() else weights[numbers])


class RowCount:
    """Counts rows and the tokens in them; `longest` is the number of tokens of the longest row."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.target_tokens = self.longest = 0

    def append(self, rows: Sequence[PackedRow], lines: Sequence[int]) -> None:
        """Count rows, given with their source lines, one line per row."""
        if not rows:
            return
        lengths = [len(row) for row in rows]
        self.rows += len(rows)
        self.tokens += sum(lengths)
        self.target_tokens += int(np.count_nonzero(np.concatenate(rows) >= TARGET_BIT))
        self.longest = max(self.longest, *lengths)


class TokenizedWriter(RowCount):
    """Writes a tokenized file under a temporary name; `publish` renames it to its final place atomically.

    Args:
        directory: the final place, which must not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._final = directory
        self._temporary = directory.with_name(f"{TEMPORARY_PREFIX}{directory.name}")
        remove_tree(self._temporary)
        self._temporary.mkdir(parents=True)
        self._streams = {name: (self._temporary / name).open("wb") for name in DTYPES}
        self._digests = {name: xxhash.xxh3_128() for name in DTYPES}
        self._append("offsets.bin", np.zeros(1, dtype="<i8"))

    def append(self, rows: Sequence[PackedRow], lines: Sequence[int]) -> None:
        """Append rows with their source lines, one line per row."""
        if not rows:
            return
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        self._append("tokens.bin", np.concatenate(rows).astype("<u4"))
        self._append("offsets.bin", (self.tokens + np.cumsum(lengths)).astype("<i8"))
        self._append("lines.bin", np.asarray(lines, dtype="<i8"))
        super().append(rows, lines)

    def publish(self, meta: dict[str, Any]) -> None:
        """Rename everything into place, `meta` included.

        Nothing is forced to the disk: damage from a power cut is noticed when the file is opened, and the file is
        rebuilt.

        Raises:
            FileExistsError: the final place exists.
        """
        files: dict[str, Any] = {}
        for name, stream in self._streams.items():
            stream.flush()
            files[name] = {"bytes": stream.tell(), "xxh3": self._digests[name].hexdigest()}
            stream.close()
        counts = {
            "format": FORMAT,
            "rows": self.rows,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "longest": self.longest,
        }
        facts = counts | meta | {"files": files}
        (self._temporary / META).write_text(json.dumps(facts | {CHECK: _check_of(facts)}, indent=2))
        if self._final.exists():
            raise FileExistsError(self._final)
        self._temporary.rename(self._final)

    def discard(self) -> None:
        """Remove what was written but not published; does nothing after `publish`."""
        for stream in self._streams.values():
            stream.close()
        remove_tree(self._temporary)

    @staticmethod
    def left(entry: Path) -> bool:
        """Whether an entry with a temporary name is what a killed writer left."""
        return is_own_folder(entry, (*DTYPES, META).__contains__)

    def _append(self, name: str, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self._streams[name].write(data)
        self._digests[name].update(data)


class TokenizedFile:
    """A published tokenized file; open it with `TokenizedFile.open`.

    Args:
        directory: its folder.
        meta: the contents of its meta.json.
    """

    def __init__(self, directory: Path, meta: dict[str, Any]) -> None:
        self.directory = directory
        self.meta = meta
        self.rows: int = meta["rows"]
        self._tokens = _map(directory, "tokens.bin")
        self._offsets = _map(directory, "offsets.bin")
        self._lines = _map(directory, "lines.bin")
        weights: list[float] = meta.get("weights", [])
        self._weights = np.array([1.0, *weights], dtype=np.float32) if weights else None

    @classmethod
    def open(cls, directory: Path, *, verify: bool = True) -> TokenizedFile:
        """Map the arrays of `directory`; with `verify`, after comparing their hashes.

        Raises:
            DamagedState: a file is missing or its size (with `verify`, also its hash) is not what was published.
            Unreadable: the machine cannot read it now, so nothing is known about it.
        """
        try:
            meta: dict[str, Any] = json.loads((directory / META).read_bytes())
            if meta["format"] not in (FORMAT, WEIGHED_FORMAT):
                raise DamagedState(f"tokenized with format {meta['format']}, not {FORMAT}", where=directory, hint=HINT)
            for name in DTYPES:
                _check_file(directory / name, meta["files"][name], verify=verify)
            _check_counts(meta)
            if CHECK in meta and meta[CHECK] != _check_of(meta):
                raise DamagedState("meta.json is not what was written", where=directory, hint=HINT)
            return cls(directory, meta)
        except OSError as error:
            if error.errno not in NO_SUCH_FILE:
                raise Unreadable.of(error, directory) from None
            raise DamagedState(
                f"a part of the tokenized file is missing: {error}", where=directory, hint=HINT
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedState(f"the tokenized file is damaged: {error}", where=directory, hint=HINT) from error

    @property
    def digest(self) -> str:
        """One digest for the tokens of all rows, their targets and their weights."""
        files = [self.meta["files"][name]["xxh3"] for name in ("tokens.bin", "offsets.bin")]
        return sha256_json([*files, self.meta.get("weights", [])])

    def holds_same(self, other: TokenizedFile) -> bool:
        """Return whether another file holds the same rows with the same targets and weights."""
        return all(self.meta.get(key) == other.meta.get(key) for key in ("rows", "files", "weights"))

    def __len__(self) -> int:
        return self.rows

    def row(self, index: int) -> Row:
        """Return a copy of the row at `index`, 0-based.

        Raises:
            IndexError: there is no such row.
        """
        self._check_index(index)
        packed = np.array(self._tokens[int(self._offsets[index]) : int(self._offsets[index + 1])])
        return unpack(packed, self._weights)

    def line(self, index: int) -> int:
        """Return the source line (or row number) of the row at `index`.

        Raises:
            IndexError: there is no such row.
        """
        self._check_index(index)
        return int(self._lines[index])

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each row, shape (rows,)."""
        return np.diff(self._offsets)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.rows:
            raise IndexError(index)


def _map(directory: Path, name: str) -> NDArray[Any]:
    return np.memmap(directory / name, dtype=DTYPES[name], mode="r")


def _check_file(path: Path, published: dict[str, Any], *, verify: bool) -> None:
    if path.stat().st_size != published["bytes"]:
        raise DamagedState("a tokenized file has changed in size", where=path, hint=HINT)
    if verify and xxh3_file(path) != published["xxh3"]:
        raise DamagedState("a tokenized file is not what was written", where=path, hint=HINT)


def _check_of(facts: dict[str, Any]) -> str:
    """Return the xxh3 of what meta.json holds besides it."""
    return xxhash.xxh3_128_hexdigest(canonical_json({key: value for key, value in facts.items() if key != CHECK}))


def _check_counts(meta: dict[str, Any]) -> None:
    sizes = {"tokens.bin": 4 * meta["tokens"], "offsets.bin": 8 * (meta["rows"] + 1), "lines.bin": 8 * meta["rows"]}
    if meta["rows"] < 1 or any(meta["files"][name]["bytes"] != size for name, size in sizes.items()):
        raise ValueError("meta.json contradicts the sizes of the files")
