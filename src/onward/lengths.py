"""What became of rows that are longer than `max_length`, counted and in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Counts of one file.

    Args:
        rows: rows that are trained, including cut ones and pieces of texts.
        truncated: rows that were cut.
        dropped: rows that were left out.
        split: texts that became several rows.
        tokens: tokens that are trained.
        lost_tokens: tokens that were cut off or left out.
    """

    rows: int
    truncated: int
    dropped: int
    split: int = 0
    tokens: int = 0
    lost_tokens: int = 0

    def words(self, max_length: int | None) -> str:
        """Return what became of longer rows, in words with a leading space; "" if there were none."""
        parts = [f"{self.split} {'text' if self.split == 1 else 'texts'} split"] if self.split else []
        counts = [(count, word) for count, word in ((self.truncated, "cut"), (self.dropped, "dropped")) if count]
        if counts:
            (count, word), *more = counts
            words = [f"{count} of {self.rows + self.dropped} rows {word}", *(f"{count} {word}" for count, word in more)]
            parts.append(" and ".join(words))
        if not parts:
            return ""
        limit = f"max_length={max_length}" if max_length else "max_length"
        share = self.lost_tokens / max(1, self.tokens + self.lost_tokens)
        lost = f": {self.lost_tokens} tokens lost, {min(99.0, 100 * share):.2g} %" if self.lost_tokens else ""
        return f" ({', '.join(parts)} at {limit}{lost})"
