"""What one check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """The result of one check; `level` is ok, warning or error."""

    level: str
    subject: str
    message: str
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return asdict(self)
