"""Commits: `current_model/`, the restore points and the ledger's account of them, kept in step.

The order of a commit: the ledger notes that one is being written (which makes the step metrics durable), the
checkpoint directory is renamed into place, the ledger moves. What follows (links, restore point, removal of the
older checkpoint) can be repeated, and `settle.py` repeats it at every start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from onward.atomic import TEMPORARY_PREFIX, fsync_directory, link_or_copy, link_tree, remove_tree
from onward.config import Config
from onward.digest import sha256_json
from onward.errors import VerificationFailed
from onward.layout import RunLayout, step_of
from onward.service.state.retention import Retention
from onward.store.ledger import Ledger
from onward.training.checkpoint import MANIFEST, Contents, Facts, Manifest, write_checkpoint
from onward.training.handover import Measurement, measure
from onward.training.state import Snapshot


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
        basis = basis_of(config, state.cursor.stream, facts.environment)
        digest = measurement.state_digest
        self._require_replay(state.step, basis, digest)
        recorded = self.ledger.checkpoint_created(state.step) is not None
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
        created = self.ledger.checkpoint_created(step_of(point))
        return point.stat().st_mtime if created is None else created

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


def basis_of(config: Config, stream: str, environment: Mapping[str, Any]) -> str:
    """Return the digest of what a step's state follows from: two states on one basis have to be equal."""
    return sha256_json([config.training(), stream, dict(environment)])


def _same_files(folder: Path, other: Path, manifest: Manifest) -> bool:
    """Whether two directories hold the same files by hard link."""
    names = [MANIFEST, *manifest.files]
    return all((folder / name).exists() and (folder / name).samefile(other / name) for name in names)
