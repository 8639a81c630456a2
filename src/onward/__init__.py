"""Onward: cumulative fine-tuning. N training files equal one run, bit for bit, and it proves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onward.run import Run

__version__ = "0.1.0"
__all__ = ["Run", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Run":
        from onward.run import Run

        return Run
    raise AttributeError(f"module 'onward' has no attribute {name!r}")
