"""Retention: which restore points are kept. A newer verified state always exists before one is removed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onward.config import Config
from onward.layout import step_of

DAY = 86_400.0


@dataclass(frozen=True)
class Retention:
    """How many of the newest restore points are kept besides the current one, and for how many days one per day."""

    boundaries: int
    days: int

    @classmethod
    def of(cls, config: Config) -> Retention:
        """Return the policy that a config asks for."""
        return cls(config.keep_boundaries, config.keep_days)

    def superfluous(self, created: Mapping[Path, float], now: float, *, adopted: int | None = None) -> list[Path]:
        """Return the restore points that no rule keeps.

        Args:
            created: restore points with the time of their commit, seconds since the epoch.
            now: the current time; a clock that was set back only keeps more.
            adopted: the step of adoption, whose restore point is always kept because it cannot be recreated.
        """
        newest_first = sorted(created, key=step_of, reverse=True)
        kept = set(newest_first[: self.boundaries + 1])
        last_of_day: dict[tuple[int, int], Path] = {}
        for point in newest_first:
            if created[point] > now - self.days * DAY:
                day = time.gmtime(created[point])
                last_of_day.setdefault((day.tm_year, day.tm_yday), point)
        kept |= set(last_of_day.values()) if self.days else set()
        return [point for point in newest_first if point not in kept and step_of(point) != adopted]
