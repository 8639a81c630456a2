"""Commits: keeps `current_model/`, the restore points and the ledger's record of them in step.

The order of a commit: the ledger records that one is being written (which makes the step metrics durable), the
checkpoint directory is renamed into place, the ledger moves. What follows (links, restore point, removal of the older
checkpoint) can be repeated, and `settle.py` repeats it at every start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from onward.atomic import TEMPORARY_PREFIX, fsync_directory, link_or_copy, link_tree
from onward.config import Config
from onward.digest import sha256_json
from onward.errors import VerificationFailed
from onward.events import FileDone
from onward.layout import MANIFEST, RunLayout, step_of
from onward.service.state.ownership import Ownership
from onward.service.state.retention import Retention
from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import Contents, Facts, Manifest, write_checkpoint
from onward.training.device.environment import promises_bits
from onward.training.measuring.handover import Measurement, measure
from onward.training.measuring.probe import Probed
from onward.training.state import Snapshot


@dataclass(frozen=True)
class Commit:
    """What to commit.

    Args:
        model: provides names and configuration; the weights are those of `state`.
        probe: measures the state on the probe; called in the thread that commits.
        parent: the previous checkpoint.
        done: what to report once it is committed.
        gather: makes model and state whole during a body, if `state` is only one rank's part.
        with_ledger: further changes of the ledger in the same transaction (a file is done).
    """

    model: nn.Module
    state: Snapshot
    config: Config
    probe: Callable[[], Probed]
    facts: Facts
    log_history: Sequence[dict[str, Any]] = ()
    parent: Manifest | None = None
    file_id: int | None = None
    with_ledger: Callable[[Ledger], None] = lambda _: None
    done: FileDone | None = None
    gather: Callable[[], AbstractContextManager[tuple[nn.Module, Snapshot]]] | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether the next file waits for the measurement: at a boundary, except for a whole state of step 0."""
        return self.state.cursor.at_boundary and (self.parent is not None or self.gather is not None)

    def whole(self) -> AbstractContextManager[tuple[nn.Module, Snapshot]]:
        """Return the context in which model and state are whole."""
        return nullcontext((self.model, self.state)) if self.gather is None else self.gather()


@dataclass(frozen=True)
class Written:
    """What a commit did.

    Args:
        manifest: the manifest of the new checkpoint.
        removed: names of the checkpoints that it replaced.
        restore_point: name of the restore point that was made from it; None within a file.
        done: what to report now.
    """

    manifest: Manifest
    removed: tuple[str, ...] = ()
    restore_point: str | None = None
    done: FileDone | None = None


class Commits:
    """Writes the checkpoints of one run, and tidies up after them."""

    def __init__(self, layout: RunLayout, ledger: Ledger) -> None:
        self.layout = layout
        self.ledger = ledger
        self.ownership = Ownership(layout, ledger)

    def commit(self, commit: Commit, measured: Callable[[Measurement], None] = lambda _: None) -> Written:
        """Commit a state; `measured` receives its measurement before anything is written.

        Raises:
            NotMadeHere: a directory that the run did not make is where the checkpoint must go; nothing changed.
            VerificationFailed: a step trained again after damage did not give the same state as before.
            NoSpace: the checkpoint does not fit; nothing changed.
        """
        with commit.whole() as (model, state):
            return self._commit(replace(commit, model=model, state=state), measured)

    def _commit(self, commit: Commit, measured: Callable[[Measurement], None]) -> Written:
        begun = time.perf_counter()
        state, config, facts = commit.state, commit.config, commit.facts
        state.wait()
        measurement = measure(state, commit.probe())
        measured(measurement)
        basis = basis_of(config, state.cursor.stream, facts.environment)
        digest = measurement.state_digest
        if promises_bits(facts.environment):
            self._require_replay(state.step, basis, digest)
        target = self.layout.checkpoint(state.step)
        self.ownership.require_free(target)
        if state.cursor.at_boundary:
            self.ownership.require_free(self.layout.boundary(state.step))
        row = self.ledger.begin_checkpoint(
            step=state.step, file_id=commit.file_id, boundary=int(state.cursor.at_boundary), state_digest=digest,
            basis=basis,
        )  # fmt: skip
        contents = Contents(commit.model, state, config, measurement, facts, commit.log_history, commit.parent)
        manifest = write_checkpoint(target, contents, recorded=True)
        with self.ledger.transaction():
            self.ledger.commit_checkpoint(row, size=manifest.size, seconds=time.perf_counter() - begun)
            commit.with_ledger(self.ledger)
        return replace(self.tidy(target, manifest, Retention.of(config)), done=commit.done)

    def _require_replay(self, step: int, basis: str, digest: str) -> None:
        lost = self.ledger.lost_digest(step, basis)
        if lost is not None and lost != digest:
            raise VerificationFailed(
                f"step {step} was trained again after damage and gave a different state",
                where=f"step {step}",
                hint="None of it was committed. Is it the same machine? onward doctor; onward rollback --to FILE",
            )

    def tidy(self, checkpoint: Path, manifest: Manifest, retention: Retention) -> Written:
        """Make the run's files on disk agree with its newest checkpoint: links, restore point, no older checkpoint.

        Anything that the run did not make is left alone.
        """
        older = [folder for folder in self.ownership.checkpoints() if folder != checkpoint]  # by the old links
        self._link_root(checkpoint, manifest)
        point = self._make_restore_point(checkpoint, manifest)
        removed = tuple(folder.name for folder in older if self.ownership.remove(folder, is_own=True))
        created = {point: self._created(point) for point in self.ownership.restore_points()}
        origin = int(self.ledger.get("origin_step", 0))
        for old in retention.superfluous(created, self.ledger.clock(), adopted=origin or None):
            self.ownership.remove(old)
        return Written(manifest, removed, point)

    def _make_restore_point(self, checkpoint: Path, manifest: Manifest) -> str | None:
        """Make the restore point of a boundary if it is missing; return its name if it was made now."""
        point = self.layout.boundary(manifest.step)
        if not manifest.cursor.at_boundary:
            return None
        self.ownership.require_free(point)
        if point.exists():
            return None
        link_tree(checkpoint, point)
        return point.name

    def _created(self, point: Path) -> float:
        """Return when the state of a restore point was committed, in seconds since the epoch."""
        created = self.ledger.checkpoint_created(step_of(point))
        return point.stat().st_mtime if created is None else created

    def _link_root(self, checkpoint: Path, manifest: Manifest) -> None:
        for name in manifest.files:
            source, link = checkpoint / name, self.layout.current / name
            if _is_same_file(source, link):
                continue
            temporary = link.with_name(f"{TEMPORARY_PREFIX}link-{name}")
            temporary.unlink(missing_ok=True)
            link_or_copy(source, temporary)
            temporary.replace(link)
        fsync_directory(self.layout.current)

    def install(self, folder: Path, manifest: Manifest, retention: Retention) -> None:
        """Make a verified checkpoint the current one; `folder` may be a restore point."""
        checkpoint = self.layout.checkpoint(manifest.step)
        if folder != checkpoint:
            self.ownership.require_free(checkpoint)
            self.ownership.remove(checkpoint)
            self.layout.current.mkdir(exist_ok=True)
            link_tree(folder, checkpoint)
        for point in self.layout.restore_points():
            stale = step_of(point) == manifest.step and not _has_same_files(point, checkpoint, manifest)
            if stale or step_of(point) > manifest.step:
                self.ownership.remove(point)
        self.tidy(checkpoint, manifest, retention)


def basis_of(config: Config, stream: str, environment: Mapping[str, Any]) -> str:
    """Return the digest of what a step's state follows from: two states with the same basis must be equal."""
    return sha256_json([config.training(), stream, dict(environment)])


def _has_same_files(folder: Path, other: Path, manifest: Manifest) -> bool:
    """Whether two directories hold the same files by hard link."""
    return all(_is_same_file(folder / name, other / name) for name in (MANIFEST, *manifest.files))


def _is_same_file(path: Path, other: Path) -> bool:
    """Whether two names are one file; False if one of them is certainly missing."""
    try:
        return path.samefile(other)
    except (FileNotFoundError, NotADirectoryError):
        return False
