"""Streams that a test moves as their owner would, without a model: trained, lost, undone."""

from __future__ import annotations

from pathlib import Path

from ledgers import add_file, made_up_run

from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord


class Stream:
    """A run whose files are trained, lost and undone by a test, as their owner would."""

    def __init__(self, directory: Path) -> None:
        self.layout = made_up_run(directory, [], lambda step: 0.0)
        self.ledger = Ledger(self.layout.ledger)
        self.step = 0
        self.file: int | None = None
        self.being_committed: int | None = None
        self.lineage: list[float] = []
        self.boundaries = [0]
        self.losses = 0

    def train(self, steps: int, *, last: bool, late: bool = False) -> None:
        """Train steps of a file, which is done with the last one, or if it is late by the next `commit`: the next file
        begins while its boundary is written.
        """
        if self.file is None:
            self.position = len(self.boundaries)
            self.file = add_file(
                self.ledger, f"{self.losses}.jsonl", state="training", position=self.position, start_step=self.step,
                planned_steps=1000,
            )  # fmt: skip
        metrics = Metrics(self.layout.ledger, clock=lambda: 1000.0 + self.losses)
        for _ in range(steps):
            self.step += 1
            self.losses += 1
            self.lineage.append(float(self.losses))
            metrics.append(StepRecord(self.file, self.step, 1, 0, 2, "d", 20, 10, float(self.losses), 1e-4, 0.5, 0.25))
        metrics.close()
        if last:
            self.commit()
            self.ledger.set_file(self.file, planned_steps=self.step - self.boundaries[-1])
            self.boundaries.append(self.step)
            self.file, self.being_committed = None, self.file
            if not late:
                self.commit()

    def commit(self) -> None:
        """Commit the boundary that is being written, if there is one."""
        if self.being_committed is not None:
            self.ledger.set_file(self.being_committed, state="done")
        self.being_committed = None

    def die_and_train_again(self, steps: int) -> None:
        """Forget uncommitted steps of the file in hand, then train them again: the same bits."""
        self.commit()
        if self.file is None:
            return
        back = max(self.boundaries[-1], self.step - steps)
        again = self.lineage[back:]
        self.ledger.trim(back, [self.file], "lost")
        metrics = Metrics(self.layout.ledger, clock=lambda: 1000.0)
        for step, loss in enumerate(again, start=back + 1):
            metrics.append(StepRecord(self.file, step, 1, 0, 2, "d", 20, 10, loss, 1e-4, 0.5, 0.25))
        metrics.close()

    def roll_back(self, boundary: int) -> None:
        """Go back to the boundary after a file."""
        self.commit()
        step = self.boundaries[boundary]
        with self.ledger.transaction():
            for row in self.ledger.files("training", "done"):
                if (row.position or 0) > boundary:
                    self.ledger.move_file(row.id, "undone")
            self.ledger.trim(step, [], "undone")
        del self.boundaries[boundary + 1 :], self.lineage[step:]
        self.step, self.file = step, None
