"""Rows of a Parquet file, in memory that depends neither on the size of a row group nor on what it unpacks to.

With a dictionary page, every row of a row group, or every item of a list, can repeat a value of megabytes at the cost
of one bit. A row group is therefore read twice: first with its dictionaries left as they are, which gives the size of
every row, then row by row in batches that are known to fit.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onward.data.files.columnar.arrow_values import (
    BATCH_BYTES,
    BATCH_ROWS,
    batch_rows,
    batch_values,
    row_sizes,
    rows_of_arrow,
)
from onward.data.files.columnar.parquet_footer import stated_groups
from onward.data.files.containers import SourceFile
from onward.data.files.faults import refuse_twice
from onward.data.files.limits import Limits

READ_BUFFER = 1 << 18
TEXT_TYPES = ("STRING", "NONE", "JSON", "ENUM")
"""Logical types of columns whose dictionaries Arrow can leave undecoded."""


def parquet_rows(source: SourceFile, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file; columns are keys.

    Raises:
        FileError: pyarrow is missing, the file is damaged, or it or a row exceeds a limit.
        OSError: the machine cannot read the file.
    """
    return rows_of_arrow("parquet", lambda: _Reader(source, limits).rows())


class _Reader:
    def __init__(self, source: SourceFile, limits: Limits) -> None:
        from pyarrow import parquet

        # by descriptor, not by name, so that what is read is what was hashed
        self._file: Any = io.FileIO(source.fileno(), closefd=False)
        self._metadata: Any = parquet.read_metadata(self._file)
        self._stated_groups = stated_groups(self._file)
        self._columns = [self._metadata.schema.column(place) for place in range(self._metadata.num_columns)]
        self._bytes = source.size
        self._limits = limits
        self._stop = source.stop
        self._unpacked = 0
        texts = [
            column.path
            for column in self._columns
            if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in TEXT_TYPES
        ]
        self._coded = self._open(texts)
        self._plain = self._open([])
        self._names = list(self._plain.schema_arrow.names)
        refuse_twice(self._names)

    def _open(self, dictionaries: Sequence[str]) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(
            self._file,
            metadata=self._metadata,
            read_dictionary=list(dictionaries),
            pre_buffer=False,
            buffer_size=READ_BUFFER,
            page_checksum_verification=True,  # where there are any
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        row = 0
        for group in range(self._metadata.num_row_groups):
            sizes = self._row_sizes(group, row)
            for batch in self._batches(self._plain, group, batch_rows(sizes)):
                for values in batch_values(batch):
                    row += 1
                    yield dict(zip(self._names, values, strict=True))

    def _row_sizes(self, group: int, before: int) -> NDArray[np.int64]:
        """Return the size of every row of a row group, or refuse the file.

        The metadata is trusted only if what it states already exceeds the limit.
        """
        stated, count = self._stated(group)
        self._limits.check_unpacked(self._unpacked + stated, self._bytes)
        if stated > max(count, 1) * self._limits.row_bytes:
            raise self._limits.row_refusal("the row" if count == 1 else "a row of this row group", before + 1)
        sizes: list[NDArray[np.int64]] = []
        batch_rows = min(max(BATCH_BYTES * count // max(stated, 1), 1), BATCH_ROWS)
        row = before
        for batch in self._batches(self._coded, group, batch_rows):
            sizes.append(row_sizes(batch))
            over = np.flatnonzero(sizes[-1] > self._limits.row_bytes)
            if len(over):
                raise self._limits.row_refusal("the row", row + int(over[0]) + 1)
            row += len(batch)
            self._unpacked += int(sizes[-1].sum())
            self._limits.check_unpacked(self._unpacked, self._bytes)
        return np.concatenate(sizes) if sizes else np.zeros(0, dtype=np.int64)

    def _stated(self, group: int) -> tuple[int, int]:
        """Return the bytes that a row group unpacks to at least, according to its metadata, and its number of rows."""
        meta = self._stated_groups[group]
        stated = 0
        for column, (values, size) in zip(self._columns, meta.columns, strict=True):
            width = column.length if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 4
            stated += max(size, values * width)
        return stated, meta.rows

    def _batches(self, reader: Any, group: int, rows: int) -> Iterator[Any]:
        self._stop()
        # one thread: two would share the position in the file
        for batch in reader.iter_batches(batch_size=rows, row_groups=[group], use_threads=False):
            yield batch
            self._stop()
