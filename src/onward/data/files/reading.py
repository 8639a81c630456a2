"""How a training file is read: what the config says about its rows, and how many of them may be bad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from onward.data.files.limits import DEFAULT_LIMITS, NO_LIMITS, Limits

if TYPE_CHECKING:
    from onward.config import Config

Documents: TypeAlias = Literal["auto", "line", "blank", "file"]
FEW = 10
"""The number of bad rows up to which their share of a file does not matter, unless they are half of it."""


@dataclass(frozen=True)
class BadRows:
    """How many rows of a file may be left out because they cannot be trained.

    Args:
        share: the share of the rows that is allowed.
        few: a number that is allowed whatever the share is, as long as most rows stay.
        known: rows that were left out when the file was accepted.
    """

    share: float = 0.0
    few: int = 0
    known: int = 0

    def may_leave_out(self, bad: int, rows: int) -> bool:
        """Return whether `bad` of a file's `rows` may be left out."""
        return bad <= self.known or bad <= self.share * rows or (bad <= self.few and 2 * bad < rows)


@dataclass(frozen=True)
class Reading:
    """How a training file is read.

    Args:
        limits: what the file and its rows may grow to.
        documents: what one row of a `.txt` file is.
        columns: the `(key, column)` pairs of the config's `columns`.
        bad_rows: how many rows may be left out, if `leaves_out`.
        leaves_out: whether bad rows are left out; otherwise one bad row refuses the file.
        is_accepted: whether the file was accepted earlier, and is not checked again.
    """

    limits: Limits = DEFAULT_LIMITS
    documents: Documents = "line"
    columns: tuple[tuple[str, str], ...] = ()
    bad_rows: BadRows = BadRows(0.05, FEW)
    leaves_out: bool = False
    is_accepted: bool = False

    @classmethod
    def of(cls, config: Config) -> Reading:
        """Return how a config says that files are read."""
        bad = BadRows(config.bad_rows_share, FEW)
        return cls(Limits.of(config), config.text.documents, _pairs(config), bad, leaves_out=config.bad_rows == "drop")

    @classmethod
    def of_accepted(cls, config: Config, bad_rows: int) -> Reading:
        """Return how to read a file again that was accepted without `bad_rows` of its rows."""
        known = BadRows(known=bad_rows)
        return cls(NO_LIMITS, config.text.documents, _pairs(config), known, leaves_out=True, is_accepted=True)

    def settings(self) -> dict[str, Any]:
        """Return the settings that tokens depend on, without those that leave rows as earlier releases read them."""
        settings: dict[str, Any] = {} if self.documents == "line" else {"documents": self.documents}
        return {**settings, "columns": dict(self.columns)} if self.columns else settings


def _pairs(config: Config) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(config.columns.items()))
