"""Why something of another tool's checkpoint is not taken."""

from __future__ import annotations


class NotTaken(Exception):
    """Why an optimizer's state cannot be gone on with."""
