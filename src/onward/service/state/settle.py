"""Settling: at a start, finds the newest checkpoint that verifies, and brings ledger and directories to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onward.atomic import remove_temporaries
from onward.config import stored_config
from onward.errors import DamagedState
from onward.layout import MANIFEST, RunLayout, entries, step_of
from onward.service.moment import require_present, require_same_moment
from onward.service.state.commits import Commits, basis_of
from onward.service.state.retention import Retention
from onward.store.ledger import Ledger
from onward.store.rows import FileRow
from onward.training.checkpoints.checkpoint import Manifest, inspect_checkpoint

TO_NOTHING = -1
"""The step that stands for no state at all, when a run is reset."""


@dataclass(frozen=True)
class Settled:
    """What settling found at a start.

    Args:
        folder: the checkpoint to continue from; None if nothing was ever committed.
        damage: what could be read but is not what was committed.
        notes: what else the user should know, reported once: directories that the run did not make.
    """

    folder: Path | None
    manifest: Manifest | None
    damage: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def messages(self) -> Iterator[str]:
        """Yield what the user should read, as sentences."""
        yield from self.notes
        for problem in self.damage:
            yield f"damaged: {problem}"


class Settlement:
    """Brings one run to its newest verifiable state.

    Args:
        stop: called while checkpoints are read, which takes long if they are large; may raise, and then nothing is
            changed that the next start does not finish.
    """

    def __init__(
        self, layout: RunLayout, ledger: Ledger, retention: Retention, stop: Callable[[], None] = lambda: None
    ) -> None:
        self._stop = stop
        self.layout = layout
        self.ledger = ledger
        self.retention = retention
        self._commits = Commits(layout, ledger)
        self._ownership = self._commits.ownership

    def settle(self) -> Settled:
        """Find the newest verifiable checkpoint, bring the ledger and the directories to it, name any damage.

        Raises:
            DamagedState: the ledger claims progress but nothing verifiable is left, or what is left is not of the same
                moment as the ledger.
            Unreadable: something cannot be read now; nothing was changed, and a later call may succeed.
            NotMadeHere: a directory that the run did not make is where one of the run must go.
        """
        remove_temporaries(self.layout.temporaries(), self._ownership.left)
        self._finish_going_back()
        claimed = self.ledger.newest_checkpoint()
        require_present(self.layout, self.ledger)
        require_same_moment(self.layout, self.ledger)
        found = self._newest_verifiable()
        notes = self._name_once(self._ownership.others())
        if found.folder is None or found.manifest is None:
            begun = claimed.step if claimed else self._origin()
            if begun > 0 or found.damage:
                raise self._nothing_left(begun, found.damage)
            self._owe_again()
            return Settled(None, None, found.damage, notes)
        self._bring_up(found.manifest)
        self._commits.install(found.folder, found.manifest, self.retention)
        for problem in found.damage:
            self.ledger.add_event("error", problem, found.manifest.step)
        return Settled(self.layout.checkpoint(found.manifest.step), found.manifest, found.damage, notes)

    def go_to(self, point: Manifest | None) -> None:
        """Bring the directories to where the ledger went back to; after a kill in between, the next start does it.

        Args:
            point: the manifest of a restore point, which was verified; None for nothing.
        """
        if point is None:
            self._remove_all()
        else:
            self._commits.install(self.layout.boundary(point.step), point, self.retention)
        self.ledger.put(going_back=None)

    def _finish_going_back(self) -> None:
        step = self.ledger.get("going_back")
        if step is None:
            return
        if step == TO_NOTHING:
            self.go_to(None)
            return
        point = inspect_checkpoint(self.layout.boundary(step), stop=self._stop)
        if point.verified is not None:
            self.go_to(point.verified)
            return
        self._leave_only_older(step, point.problems)  # damaged meanwhile
        self.ledger.put(going_back=None)

    def _leave_only_older(self, step: int, problems: list[str]) -> None:
        """Remove what came after a step and is undone, so that settling finds an older state.

        Raises:
            DamagedState: none verifies; nothing was removed.
        """
        own = [*self._ownership.checkpoints(), *self._ownership.restore_points()]
        older = (folder for folder in own if step_of(folder) < step)
        if not any(inspect_checkpoint(folder, stop=self._stop).verified for folder in older):
            place = self.layout.boundary(step).relative_to(self.layout.root)
            raise self._nothing_left(step, [f"{place}/{problem}" for problem in problems])
        for folder in own:
            if step_of(folder) > step:
                self._ownership.remove(folder)

    def _origin(self) -> int:
        return int(self.ledger.get("origin_step", 0))

    def _remove_all(self) -> None:
        """Remove every checkpoint and restore point of the run and the links to their files, and nothing else."""
        own = [*self._ownership.checkpoints(), *self._ownership.restore_points()]
        for name in {entry.name for folder in own for entry in entries(folder)} - {MANIFEST}:
            link = self.layout.current / name
            if link.is_file():
                link.unlink()
        for folder in own:
            self._ownership.remove(folder)
        with contextlib.suppress(OSError):  # it has files that the run did not make, or it is gone
            self.layout.current.rmdir()

    def _name_once(self, others: list[Path]) -> list[str]:
        """Record and return notes on directories that the run did not make, unless they were named before."""
        names = [str(folder.relative_to(self.layout.root)) for folder in others]
        known: list[str] = self.ledger.get("left_alone", [])
        if names == known:
            return []
        notes = [f"{name} was not made by this run and is left alone" for name in names if name not in known]
        with self.ledger.transaction():
            self.ledger.put(left_alone=names)
            for note in notes:
                self.ledger.add_event("warning", note)
        return notes

    def _newest_verifiable(self) -> Settled:
        damage: list[str] = []
        checkpoints = self._ownership.checkpoints()
        claimed = self.ledger.newest_checkpoint()
        if claimed and self.layout.checkpoint(claimed.step) not in checkpoints:
            damage.append(f"checkpoint-{claimed.step} is missing")
        for folder in sorted([*checkpoints, *self._ownership.restore_points()], key=step_of, reverse=True):
            if self.ledger.is_given_up(step_of(folder)):  # put back: the records of its steps are gone
                continue
            found = inspect_checkpoint(folder, stop=self._stop)
            place = folder.relative_to(self.layout.root)
            if found.verified is not None:
                return Settled(folder, found.verified, damage)
            damage += [f"{place}/{problem}" for problem in found.problems]
        return Settled(None, None, damage)

    def _nothing_left(self, step: int, damage: list[str]) -> DamagedState:
        return DamagedState(
            f"the ledger claims {step} steps, but no checkpoint or restore point verifies: {'; '.join(damage)}",
            where=self.layout.root,
            hint="Restore the files from a copy, then: onward verify. To start over: onward reset",
        )

    def _owe_again(self) -> None:
        """Queue again the files that were begun before anything was committed."""
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
                f"the ledger has {row.name} at position {cursor.position}, the checkpoint has another file",
                where=self.layout.checkpoint(manifest.step) / MANIFEST,
                hint="Ledger and model are not from the same moment. Restore both from one copy.",
            )
        if row.state == wanted:
            return
        if row.state == "queued":
            self.ledger.move_file(row.id, "training")
            if wanted == "training":
                return
        values: dict[str, Any] = {"finished": self.ledger.clock()} if wanted == "done" else {"finished": None}
        self.ledger.move_file(row.id, wanted, **values)
