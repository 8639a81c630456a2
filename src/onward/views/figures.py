"""The run's steps as data for other programs: CSV, JSON, Parquet."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import IO, Any

from onward.curve import COLUMNS, as_columns, read_curve
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.store.ledger import Ledger
from onward.text import printable

BLOCK = 50_000
"""How many steps are written to a Parquet file at a time."""
TYPES = ("int64", "string", "int64", "double", "double", "double", "int64", "int64", "int64", "double", "double")
"""Arrow's types of the columns."""

Step = tuple[Any, ...]


def steps(layout: RunLayout, every: int = 1) -> Iterator[Step]:
    """Return the steps of the run's stream as tuples of `COLUMNS`; `file` is printable.

    Args:
        every: thin them to one step in so many, keeping lowest and highest losses.

    Raises:
        UsageError: there is no run.
    """
    layout.require()
    return _steps(layout, every)


def _steps(layout: RunLayout, every: int) -> Iterator[Step]:
    with Ledger(layout.ledger, read_only=True) as ledger:
        for step in read_curve(ledger, every):
            yield (step[0], printable(step[1]), *step[2:])


def write_csv(rows: Iterable[Step], stream: IO[str]) -> None:
    """Write steps as CSV with a header line; unknown values are empty."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)


def write_json(rows: Iterable[Step], stream: IO[str]) -> None:
    """Write steps as a JSON list of objects, one per line, so that the whole is never in memory."""
    before = "["
    for row in rows:
        stream.write(f"{before}\n  {json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False)}")
        before = ","
    stream.write("[]\n" if before == "[" else "\n]\n")


def parquet_writer() -> Callable[[Iterable[Step], IO[bytes]], None]:
    """Return what writes steps as a Parquet file.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError("Parquet needs pyarrow", where="--parquet", hint="pip install 'onward[parquet]'") from None
    return _write_parquet


def _write_parquet(rows: Iterable[Step], stream: IO[bytes]) -> None:
    import pyarrow as arrow
    from pyarrow.parquet import ParquetWriter

    schema: Any = arrow.schema(list(zip(COLUMNS, map(arrow.type_for_alias, TYPES), strict=True)))
    steps = iter(rows)
    with ParquetWriter(stream, schema) as writer:
        while block := list(islice(steps, BLOCK)):
            writer.write_table(arrow.table(as_columns(block), schema=schema))
