"""Why a part of another tool's checkpoint cannot be used."""

from __future__ import annotations


class NotTaken(Exception):
    """Why an optimizer's state cannot be continued.

    Args:
        reason: what about it cannot be continued.
        setting: words of a command with which it can; empty if there are none.
    """

    def __init__(self, reason: str, setting: str = "") -> None:
        super().__init__(reason)
        self.setting = setting
