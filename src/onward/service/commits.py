"""Commits: `current_model/`, the restore points and the ledger's account of them, kept in step.

The order of a commit: the ledger notes that one is being written (which makes the step metrics durable), the
checkpoint directory is renamed into place, the ledger moves. What follows (links, restore point, removal of the
older checkpoint) can be repeated, and `settle` repeats it at every start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from onward.atomic import TEMPORARY_PREFIX, fsync_directory, link_or_copy, link_tree, remove_temporaries, remove_tree
from onward.config import Config
from onward.digest import sha256_json
from onward.errors import DamagedState, VerificationFailed
from onward.layout import RunLayout, step_of
from onward.service.retention import Retention
from onward.store.ledger import IN_STREAM, Ledger
from onward.training.checkpoint import MANIFEST, Contents, Facts, Manifest, inspect_checkpoint, write_checkpoint
from onward.training.handover import Measurement, measure
from onward.training.state import Snapshot

TO_NOTHING = -1
"""The step to go back to when a run is reset."""


@dataclass(frozen=True)
class Settled:
    """What a start found: the checkpoint to go on from (None: nothing was ever committed) and what was wrong."""

    folder: Path | None
    manifest: Manifest | None
    damage: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Commit:
    """What is to be committed.

    Args:
        model: gives names and configuration; the weights are those of `state`.
        probe_loss: measures the state's loss on the probe; called where the commit is made.
        parent: the checkpoint before.
        with_ledger: further moves of the ledger that belong to the same transaction (a file is done).
    """

    model: nn.Module
    state: Snapshot
    config: Config
    probe_loss: Callable[[], float]
    facts: Facts
    log_history: Sequence[dict[str, Any]] = ()
    parent: Manifest | None = None
    file_id: int | None = None
    with_ledger: Callable[[Ledger], None] = lambda _: None


class Commits:
    """Writes, finds and tidies the checkpoints of one run."""

    def __init__(self, layout: RunLayout, ledger: Ledger) -> None:
        self.layout = layout
        self.ledger = ledger

    def commit(self, commit: Commit, measured: Callable[[Measurement], None] = lambda _: None) -> Manifest:
        """Commit a state; `measured` is told what was measured of it before anything is written.

        Raises:
            VerificationFailed: a step trained again after damage did not give the state that was there before.
            NoSpace: the checkpoint does not fit; nothing changed.
        """
        begun = time.perf_counter()
        state, config, facts = commit.state, commit.config, commit.facts
        measurement = measure(state, commit.probe_loss())
        measured(measurement)
        basis = _basis(config, state.cursor.stream, facts.environment)
        digest = measurement.state_digest
        self._require_replay(state.step, basis, digest)
        recorded = self.ledger.one("SELECT 1 FROM checkpoints WHERE step = ?", state.step) is not None
        row = self.ledger.begin_checkpoint(
            step=state.step, file_id=commit.file_id, boundary=int(state.cursor.at_boundary), state_digest=digest,
            basis=basis,
        )  # fmt: skip
        target = self.layout.checkpoint(state.step)
        contents = Contents(commit.model, state, config, measurement, facts, commit.log_history, commit.parent)
        manifest = write_checkpoint(target, contents, recorded=recorded)
        with self.ledger.transaction():
            self.ledger.commit_checkpoint(row, size=manifest.size, seconds=time.perf_counter() - begun)
            commit.with_ledger(self.ledger)
        self.tidy(target, manifest, Retention.of(config))
        return manifest

    def _require_replay(self, step: int, basis: str, digest: str) -> None:
        lost = self.ledger.lost_digest(step, basis)
        if lost is not None and lost != digest:
            raise VerificationFailed(
                f"step {step} was trained again after damage and gave another state than before",
                where=f"step {step}",
                hint="Nothing of it was committed. Is it the same machine? onward doctor; onward rollback --to FILE",
            )

    def tidy(self, checkpoint: Path, manifest: Manifest, retention: Retention) -> None:
        """Make everything beside the newest checkpoint agree with it: links, restore point, no other checkpoint."""
        self._link_root(checkpoint, manifest)
        if manifest.cursor.at_boundary and not self.layout.boundary(manifest.step).exists():
            link_tree(checkpoint, self.layout.boundary(manifest.step))
        for other in self.layout.checkpoints():
            if other != checkpoint:
                remove_tree(other)
        created = {point: self._created(point) for point in self.layout.restore_points()}
        for old in retention.superfluous(created, self.ledger.clock()):
            remove_tree(old)

    def _created(self, point: Path) -> float:
        """When the state of a restore point was committed, seconds since the epoch."""
        row = self.ledger.one("SELECT max(created) AS at FROM checkpoints WHERE step = ?", step_of(point))
        return float(row["at"]) if row and row["at"] is not None else point.stat().st_mtime

    def _link_root(self, checkpoint: Path, manifest: Manifest) -> None:
        for name in manifest.files:
            source, link = checkpoint / name, self.layout.current / name
            if link.exists() and source.samefile(link):
                continue
            temporary = link.with_name(f"{TEMPORARY_PREFIX}{name}")
            temporary.unlink(missing_ok=True)
            link_or_copy(source, temporary)
            temporary.replace(link)
        fsync_directory(self.layout.current)

    def settle(self, retention: Retention) -> Settled:
        """Find the newest verifiable checkpoint, bring the ledger and the directories to it, name any damage.

        Raises:
            DamagedState: the ledger claims progress and nothing verifiable is left, or what is left is another run's.
        """
        for folder in (self.layout.root, self.layout.current, self.layout.boundaries):
            remove_temporaries(folder)
        self.finish_going_back(retention)
        claimed = self.ledger.newest_checkpoint()
        if claimed and claimed["step"] > self._origin() and not self._has_model():
            raise DamagedState(
                f"current_model is gone, and the ledger claims {claimed['step']} steps",
                where=self.layout.current,
                hint="onward rollback --to FILE restores a boundary; onward reset starts over, if you mean it.",
            )
        found = self._newest_verifiable()
        if found.folder is None or found.manifest is None:
            begun = claimed["step"] if claimed else self._origin()
            if begun > 0 or found.damage:
                raise self._nothing_left(begun, found.damage)
            self._owe_again()
            return found
        if found.manifest.run != self.ledger.get("run"):
            hint = f"onward adopt {found.folder} --run NEW_RUN makes a run of it."
            raise DamagedState("the checkpoint belongs to another run", where=found.folder, hint=hint)
        self._bring_up(found.manifest)
        self.install(found.folder, found.manifest, retention)
        for problem in found.damage:
            self.ledger.add_event("error", problem, found.manifest.step)
        return Settled(self.layout.checkpoint(found.manifest.step), found.manifest, found.damage)

    def install(self, folder: Path, manifest: Manifest, retention: Retention) -> None:
        """Make a verified checkpoint the current one; `folder` may be a restore point."""
        checkpoint = self.layout.checkpoint(manifest.step)
        if folder != checkpoint:
            remove_tree(checkpoint)
            self.layout.current.mkdir(exist_ok=True)
            link_tree(folder, checkpoint)
        for point in self.layout.restore_points():
            stale = step_of(point) == manifest.step and not _same_files(point, checkpoint, manifest)
            if stale or step_of(point) > manifest.step:
                remove_tree(point)
        self.tidy(checkpoint, manifest, retention)

    def finish_going_back(self, retention: Retention) -> None:
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
            found = inspect_checkpoint(folder)
            if found.verified is None:
                raise DamagedState(f"the restore point does not verify: {'; '.join(found.problems)}", where=folder)
            self.install(folder, found.verified, retention)
        self.ledger.put(going_back=None)

    def _origin(self) -> int:
        return int(self.ledger.get("origin_step", 0))

    def _has_model(self) -> bool:
        return self.layout.current.is_dir() and any(self.layout.current.iterdir())

    def _newest_verifiable(self) -> Settled:
        damage: list[str] = []
        folders = sorted([*self.layout.checkpoints(), *self.layout.restore_points()], key=step_of, reverse=True)
        claimed = self.ledger.newest_checkpoint()
        if claimed and not self.layout.checkpoint(claimed["step"]).is_dir():
            damage.append(f"checkpoint-{claimed['step']} is missing")
        for folder in folders:
            found = inspect_checkpoint(folder)
            place = folder.relative_to(self.layout.root)
            if found.verified is not None:
                return Settled(folder, found.verified, damage)
            damage += [f"{place}/{problem}" for problem in found.problems]
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
                self.ledger.move_file(row["id"], "queued")
            self.ledger.trim(0, [row["id"] for row in begun], "lost")

    def _bring_up(self, manifest: Manifest) -> None:
        """Move the ledger to a checkpoint: forward after a kill between rename and ledger, back after damage."""
        ledger, cursor, step = self.ledger, manifest.cursor, manifest.step
        with ledger.transaction():
            held = ledger.query(
                f"SELECT * FROM files WHERE {IN_STREAM} AND (position >= ? OR state != 'done') ORDER BY position",
                cursor.position,
            )
            for row in held:
                self._bring_up_file(row, manifest)
            ledger.trim(step, [row["id"] for row in held if row["position"] >= cursor.position], "lost")
            newest = ledger.newest_checkpoint()
            if newest is None or newest["step"] < step:
                row = ledger.at_position(cursor.position)
                basis = _basis(Config.model_validate(manifest.config), cursor.stream, manifest.environment)
                number = ledger.begin_checkpoint(
                    step=step, file_id=row["id"] if row else None, boundary=int(cursor.at_boundary),
                    state_digest=manifest.state_digest, basis=basis,
                )  # fmt: skip
                ledger.commit_checkpoint(number, size=manifest.size, seconds=0.0)

    def _bring_up_file(self, row: dict[str, Any], manifest: Manifest) -> None:
        cursor = manifest.cursor
        if row["position"] > cursor.position:
            wanted = "queued"
        elif row["position"] < cursor.position or cursor.at_boundary:
            wanted = "done"
        else:
            wanted = "training"
        if row["position"] == cursor.position and row["sha256"] != cursor.sha256:
            raise DamagedState(
                f"the ledger has {row['name']} at position {cursor.position}, the checkpoint another file",
                where=self.layout.checkpoint(manifest.step) / MANIFEST,
                hint="Ledger and model are not from the same moment. Put both back from one copy.",
            )
        if row["state"] == wanted:
            return
        if row["state"] == "queued":
            self.ledger.move_file(row["id"], "training")
            if wanted == "training":
                return
        values: dict[str, Any] = {"finished": self.ledger.clock()} if wanted == "done" else {"finished": None}
        self.ledger.move_file(row["id"], wanted, **values)


def _basis(config: Config, stream: str, environment: Mapping[str, Any]) -> str:
    """Return the digest of what a step's state follows from: two states on one basis have to be equal."""
    return sha256_json([config.training(), stream, dict(environment)])


def _same_files(folder: Path, other: Path, manifest: Manifest) -> bool:
    """Whether two directories hold the same files by hard link."""
    names = [MANIFEST, *manifest.files]
    return all((folder / name).exists() and (folder / name).samefile(other / name) for name in names)
