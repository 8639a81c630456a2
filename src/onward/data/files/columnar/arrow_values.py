"""Arrow batches as Python values, in memory bounded by the size of each row."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onward.data.files.faults import FileError, described, is_of_machine
from onward.data.files.limits import VALUE_BYTES
from onward.data.row_types import UnreadableValue

BATCH_ROWS = 1024
BATCH_BYTES = 8 << 20


def rows_of_arrow(form: str, read: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that pyarrow reads; whatever pyarrow raises on damage becomes a refusal of the file.

    Args:
        form: the ending of the file's name, without its dot.
        read: yields the rows; called once pyarrow is known to be installed.

    Raises:
        FileError: pyarrow is missing, or the file is damaged.
        OSError: the machine cannot read the file.
    """
    try:
        import pyarrow
    except ImportError:
        raise FileError(f"reading .{form} needs pyarrow", "pip install 'onward[parquet]'") from None
    rows = 0
    try:
        for row in read():
            rows += 1
            yield row
    except (pyarrow.ArrowException, OSError, struct.error, IndexError, KeyError, TypeError, ValueError) as error:
        if is_of_machine(error):
            raise
        what = f"not a readable {form} file ({described(error)})"
        raise FileError(what, "write or download it again", rows + 1 if rows else None) from None


def require_sound(batch: Any) -> None:
    """Refuse a batch whose offsets, views or indices point outside of it: Arrow would follow them anywhere in memory.

    Text that is not UTF-8 passes: that is a problem of its row.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowIndexError: the batch is damaged.
    """
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowException:
        for column in batch.columns:
            column.view(_with_bytes(column.type)).validate(full=True)


def batch_rows(sizes: NDArray[np.int64]) -> int:
    """Return how many rows a batch may have so that no batch exceeds `BATCH_BYTES`; at least 1."""
    rows = BATCH_ROWS
    while rows > 1 and len(sizes) and np.add.reduceat(sizes, np.arange(0, len(sizes), rows)).max() > BATCH_BYTES:
        rows //= 2
    return rows


def batch_values(batch: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the values of each row of a batch."""
    return zip(*[_values(column) for column in batch.columns], strict=True)


def row_sizes(batch: Any) -> NDArray[np.int64]:
    """Return the bytes that each row of a batch takes as text, plus the overhead of each value."""
    return sum((_sizes(column) for column in batch.columns), np.zeros(len(batch), dtype=np.int64))


def unknown_type(kind: Any) -> bool:
    """Return whether a type is, or contains, one whose values may take memory that `row_sizes` does not see."""
    from pyarrow import types

    checks = (types.is_list_view, types.is_large_list_view, types.is_run_end_encoded, types.is_union)
    inner = [kind.field(place).type for place in range(kind.num_fields)] if not types.is_dictionary(kind) else []
    return any(check(kind) for check in checks) or any(map(unknown_type, inner))


def _with_bytes(kind: Any) -> Any:
    """Return a type of the same layout with bytes in place of text."""
    import pyarrow
    from pyarrow import types

    def of(field: Any) -> Any:
        return field.with_type(_with_bytes(field.type))

    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_string_view(kind):
        return pyarrow.binary_view()
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _with_bytes(kind.value_type), kind.ordered)
    if types.is_struct(kind):
        return pyarrow.struct([of(kind.field(place)) for place in range(kind.num_fields)])
    if types.is_map(kind):
        return pyarrow.map_(of(kind.key_field), of(kind.item_field), kind.keys_sorted)
    if types.is_large_list(kind):
        return pyarrow.large_list(of(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(of(kind.value_field), kind.list_size)
    return pyarrow.list_(of(kind.value_field)) if types.is_list(kind) else kind


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except Exception as error:  # text that is not UTF-8, nanoseconds, two fields of the same name
        if is_of_machine(error):
            raise
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception as error:
        if is_of_machine(error):
            raise
        return UnreadableValue(described(error))


def _sizes(array: Any) -> NDArray[np.int64]:
    """Return the bytes that each element of an Arrow array takes as text, plus the overhead of each value."""
    from pyarrow import types

    compute: Any = importlib.import_module("pyarrow.compute")  # it creates its functions when imported
    kind = array.type
    own = np.full(len(array), VALUE_BYTES, dtype=np.int64)
    if types.is_dictionary(kind):
        values = np.append(_sizes(array.dictionary), VALUE_BYTES)
        return values[compute.fill_null(array.indices, len(values) - 1).to_numpy(zero_copy_only=False)]
    if types.is_struct(kind):
        return sum((_sizes(field) for field in array.flatten()), own)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        ends = np.append(0, np.cumsum(_items(array)))[array.offsets.to_numpy()]
        return own + np.diff(ends)
    if types.is_fixed_size_list(kind):
        ends = np.append(0, np.cumsum(_sizes(array.values)))
        first = np.arange(len(array)) + array.offset
        return own + ends[(first + 1) * kind.list_size] - ends[first * kind.list_size]
    if hasattr(array, "storage"):
        return _sizes(array.storage)
    if types.is_fixed_size_binary(kind):
        return own + kind.byte_width
    if types.is_string_view(kind) or types.is_binary_view(kind):
        lengths = np.frombuffer(array.buffers()[1], dtype=np.int32).reshape(-1, 4)[:, 0]
        return own + np.maximum(lengths[array.offset : array.offset + len(array)], 0)
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        return own + compute.fill_null(compute.binary_length(array), 0).to_numpy(zero_copy_only=False)
    return own


def _items(array: Any) -> NDArray[np.int64]:
    """Return the sizes of all items that the lists of an array are cut from."""
    from pyarrow import types

    if types.is_map(array.type):
        return _sizes(array.keys) + _sizes(array.items)
    return _sizes(array.values)
