"""The run that tests of the page look at: made up, not trained."""

from __future__ import annotations

from onward.layout import RunLayout

FILES = [("a.jsonl", 7), ("b.jsonl", 93)]
"""Its files, with their steps."""
HOSTILE = "<script>alert(1)</script>"


def falling(step: int) -> float:
    """A loss that falls, with a peak."""
    return 50.0 if step == 33 else 5.0 / step


def files_in(layout: RunLayout) -> list[str]:
    """Names of everything in the inbox."""
    return sorted(path.name for path in layout.inbox.rglob("*"))
