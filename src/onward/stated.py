"""What the manifest of a checkpoint states, unchecked: enough to know whose it is, and read without torch."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from onward.errors import Unreadable
from onward.layout import MANIFEST

NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""Read errors that mean that there is no such file; all others say nothing about it."""


def read_if_there(path: Path) -> bytes | None:
    """Return the content of a file; None if there is no such file.

    Raises:
        Unreadable: it cannot be read now.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in NO_SUCH_FILE:
            return None
        raise Unreadable.of(error, path) from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the content of a manifest; empty if it is not JSON, None if there is no manifest.

    Raises:
        Unreadable: it cannot be read now.
    """
    content = read_if_there(folder / MANIFEST)
    if content is None:
        return None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], values) if isinstance(values, dict) else {}


def stated_origin(folder: Path) -> tuple[Any, Any] | None:
    """Return the run and the step that a manifest states; None if there is no manifest.

    Raises:
        Unreadable: it cannot be read now.
    """
    values = read_manifest(folder)
    return None if values is None else origin_of(values)


def origin_of(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the run and the step that the content of a manifest states."""
    return values.get("run"), values.get("step")
