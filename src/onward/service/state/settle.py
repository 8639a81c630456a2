"""Settling: a start finds the newest checkpoint that verifies, and brings ledger and directories to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onward.atomic import remove_temporaries, remove_tree
from onward.config import stored_config
from onward.errors import DamagedState
from onward.layout import RunLayout, step_of
from onward.service.state.commits import Commits, basis_of
from onward.service.state.retention import Retention
from onward.store.ledger import Ledger
from onward.store.rows import FileRow
from onward.text import quoted
from onward.training.checkpoint import MANIFEST, Manifest, inspect_checkpoint

TO_NOTHING = -1
"""The step to go back to when a run is reset."""


@dataclass(frozen=True)
class Settled:
    """What a start found: the checkpoint to go on from (None: nothing was ever committed) and what was wrong."""

    folder: Path | None
    manifest: Manifest | None
    damage: list[str] = field(default_factory=list[str])


class Settlement:
    """Brings one run to its newest verifiable state."""

    def __init__(self, layout: RunLayout, ledger: Ledger, retention: Retention) -> None:
        self.layout = layout
        self.ledger = ledger
        self.retention = retention
        self._commits = Commits(layout, ledger)

    def settle(self) -> Settled:
        """Find the newest verifiable checkpoint, bring the ledger and the directories to it, name any damage.

        Raises:
            DamagedState: the ledger claims progress and nothing verifiable is left, or what is left is another run's.
        """
        for folder in (self.layout.root, self.layout.current, self.layout.boundaries):
            remove_temporaries(folder)
        self.finish_going_back()
        claimed = self.ledger.newest_checkpoint()
        if claimed and claimed.step > self._origin() and not self._has_model():
            raise DamagedState(
                f"current_model is gone, and the ledger claims {claimed.step} steps",
                where=self.layout.current,
                hint="onward rollback --to FILE restores a boundary; onward reset starts over, if you mean it.",
            )
        found = self._newest_verifiable()
        if found.folder is None or found.manifest is None:
            begun = claimed.step if claimed else self._origin()
            if begun > 0 or found.damage:
                raise self._nothing_left(begun, found.damage)
            self._owe_again()
            return found
        if found.manifest.run != self.ledger.get("run"):
            hint = f"onward adopt {quoted(found.folder)} --run NEW_RUN makes a run of it."
            raise DamagedState("the checkpoint belongs to another run", where=found.folder, hint=hint)
        self._bring_up(found.manifest)
        self._commits.install(found.folder, found.manifest, self.retention)
        for problem in found.damage:
            self.ledger.add_event("error", problem, found.manifest.step)
        return Settled(self.layout.checkpoint(found.manifest.step), found.manifest, found.damage)

    def finish_going_back(self) -> None:
        """Bring the directories to where the ledger went back to; a kill in between is mended by the next start.

        Raises:
            DamagedState: the restore point no longer verifies.
        """
        step = self.ledger.get("going_back")
        if step is None:
            return
        if step == TO_NOTHING:
            for folder in (self.layout.current, *self.layout.restore_points()):
                remove_tree(folder)
        else:
            folder = self.layout.boundary(step)
            manifest, problems = inspect_checkpoint(folder)
            if manifest is None or problems:
                raise DamagedState(f"the restore point does not verify: {'; '.join(problems)}", where=folder)
            self._commits.install(folder, manifest, self.retention)
        self.ledger.put(going_back=None)

    def _origin(self) -> int:
        return int(self.ledger.get("origin_step", 0))

    def _has_model(self) -> bool:
        return self.layout.current.is_dir() and any(self.layout.current.iterdir())

    def _newest_verifiable(self) -> Settled:
        damage: list[str] = []
        folders = sorted([*self.layout.checkpoints(), *self.layout.restore_points()], key=step_of, reverse=True)
        claimed = self.ledger.newest_checkpoint()
        if claimed and not self.layout.checkpoint(claimed.step).is_dir():
            damage.append(f"checkpoint-{claimed.step} is missing")
        for folder in folders:
            manifest, problems = inspect_checkpoint(folder)
            place = folder.relative_to(self.layout.root)
            if manifest is not None and not problems:
                return Settled(folder, manifest, damage)
            damage += [f"{place}/{problem}" for problem in problems]
        return Settled(None, None, damage)

    def _nothing_left(self, step: int, damage: list[str]) -> DamagedState:
        return DamagedState(
            f"the ledger claims {step} steps and no checkpoint or restore point verifies: {'; '.join(damage)}",
            where=self.layout.root,
            hint="Put the files back from a copy, then: onward verify. To start over: onward reset",
        )

    def _owe_again(self) -> None:
        """Put back what was begun before anything was committed."""
        begun = self.ledger.files("training")
        with self.ledger.transaction():
            for row in begun:
                self.ledger.move_file(row.id, "queued")
            self.ledger.trim(0, [row.id for row in begun], "lost")

    def _bring_up(self, manifest: Manifest) -> None:
        """Move the ledger to a checkpoint: forward after a kill between rename and ledger, back after damage."""
        ledger, cursor, step = self.ledger, manifest.cursor, manifest.step
        with ledger.transaction():
            held = ledger.unfinished_from(cursor.position)
            for row in held:
                self._bring_up_file(row, manifest)
            ledger.trim(step, [row.id for row in held if row.place >= cursor.position], "lost")
            newest = ledger.newest_checkpoint()
            if newest is None or newest.step < step:
                row = ledger.at_position(cursor.position)
                basis = basis_of(stored_config(manifest.config), cursor.stream, manifest.environment)
                number = ledger.begin_checkpoint(
                    step=step, file_id=row.id if row else None, boundary=int(cursor.at_boundary),
                    state_digest=manifest.state_digest, basis=basis,
                )  # fmt: skip
                ledger.commit_checkpoint(number, size=manifest.size, seconds=0.0)

    def _bring_up_file(self, row: FileRow, manifest: Manifest) -> None:
        cursor = manifest.cursor
        if row.place > cursor.position:
            wanted = "queued"
        elif row.place < cursor.position or cursor.at_boundary:
            wanted = "done"
        else:
            wanted = "training"
        if row.position == cursor.position and row.sha256 != cursor.sha256:
            raise DamagedState(
                f"the ledger has {row.name} at position {cursor.position}, the checkpoint another file",
                where=self.layout.checkpoint(manifest.step) / MANIFEST,
                hint="Ledger and model are not from the same moment. Put both back from one copy.",
            )
        if row.state == wanted:
            return
        if row.state == "queued":
            self.ledger.move_file(row.id, "training")
            if wanted == "training":
                return
        values: dict[str, Any] = {"finished": self.ledger.clock()} if wanted == "done" else {"finished": None}
        self.ledger.move_file(row.id, wanted, **values)
