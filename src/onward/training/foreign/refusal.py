"""Why something of another tool's checkpoint is not taken."""

from __future__ import annotations


class NotTaken(Exception):
    """Why an optimizer's state cannot be gone on with.

    Args:
        reason: what of it cannot.
        setting: words of a command with which it can; empty where there are none.
    """

    def __init__(self, reason: str, setting: str = "") -> None:
        super().__init__(reason)
        self.setting = setting
