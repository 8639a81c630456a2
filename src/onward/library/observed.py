"""A run for observers, any number of them at any time: its progress, its files, its steps."""

from __future__ import annotations

from typing import Any

from onward import status
from onward.curve import as_columns, read_curve
from onward.layout import RunLayout
from onward.store.ledger import Ledger


class Observed:
    """What can be read of a run without opening it for work; nothing here needs torch.

    Raises:
        UsageError: the directory is not a run.
    """

    def __init__(self, layout: RunLayout) -> None:
        self.layout = layout
        self.layout.require()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.layout.root)!r})"

    def status(self) -> dict[str, Any]:
        """Return where the run stands (keys as in `onward status --json`)."""
        return status.read_status(self.layout)

    def history(self) -> list[dict[str, Any]]:
        """Return one entry per file (keys as in `onward history --json`)."""
        return status.read_history(self.layout)

    def grid(self) -> dict[str, Any]:
        """Return what the model knows of each file, after each file (keys as in `onward grid --json`)."""
        return status.read_grid(self.layout)

    def metrics(self, every: int = 1) -> dict[str, list[Any]]:
        """Return the steps of the stream by column: `pandas.DataFrame(run.metrics())`.

        Columns are `step`, `file` (its name), `file_step`, `loss`, `learning_rate`, `grad_norm`, `rows`, `tokens`,
        `target_tokens`, `seconds` and `time` (seconds since the epoch; None for steps of earlier releases).

        Args:
            every: thin them to one step in so many, keeping lowest and highest losses.
        """
        with Ledger(self.layout.ledger, read_only=True) as ledger:
            return as_columns(read_curve(ledger, every))
