"""Results of commands as JSON."""

from __future__ import annotations

import json
from typing import Any

from onward.terminal import show_line


def show(value: Any) -> None:
    """Print a result as JSON."""
    show_line(json.dumps(value, indent=2, ensure_ascii=False))
