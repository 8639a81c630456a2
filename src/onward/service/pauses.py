"""How long to wait before something that failed is tried again: twice as long after each failure in a row."""

from __future__ import annotations

LONGEST = 300.0
"""The most seconds between two tries."""
DOUBLINGS = 64
"""Powers of two beyond what a float holds are refused by Python, and something may fail for days."""


def pause_after(failures: int, first: float = 1.0) -> float:
    """Return the seconds to wait after so many failures in a row, however many there are.

    Args:
        failures: 1 or more.
        first: seconds after the first one.
    """
    return min(first * 2.0 ** min(failures - 1, DOUBLINGS), LONGEST)
