"""A run with a sharded model, as led by rank 0: whatever all ranks do together is first announced to the others."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from onward.atomic import remove_tree
from onward.config import Config
from onward.errors import RankLost, first_line
from onward.service.session import Session
from onward.training.checkpoints.checkpoint import Manifest, require_space
from onward.training.device.execution import Execution, Placement
from onward.training.measuring.handover import Measurement
from onward.training.measuring.probe import Probed
from onward.training.model.spec import ModelSpec
from onward.training.ranks.orders import COMMIT, LOAD, MEASURE
from onward.training.sharding.files import host_mesh, read_manifest, require_files
from onward.training.sharding.held import Held, hold
from onward.training.sharding.needs import require_shardable
from onward.training.sharding.whole import whole_state
from onward.training.state import Snapshot
from onward.training.world import Message

COPIES = 3
"""How many times the size of a state a commit takes on the disk: shards, whole tensors, the checkpoint."""
GatherContext = AbstractContextManager[tuple[nn.Module, Snapshot]]


def load_order(session: Session, config: Config, folder: Path | None, manifest: Manifest | None) -> Message:
    """Return the order with what another rank needs to build its part of a run."""
    root = session.layout.root
    return {
        "order": LOAD,
        "config": config.recorded(),
        "dtype": str(session.dtype).removeprefix("torch."),
        "model": session.execution.model,
        "folder": None if folder is None else folder.relative_to(root).as_posix(),
        "manifest": None if manifest is None else manifest.model_dump(mode="json"),
        "pad_id": session.execution.pad_id,
        "by_length": session.execution.by_length,
    }


def load_in_shards(session: Session, config: Config, folder: Path | None, manifest: Manifest | None) -> ShardedRun:
    """Build the run's sharded model, on all ranks.

    Raises:
        ConfigError: the config asks for something that sharding does not support.
        DamagedState, ModelError: a rank cannot build its part.
    """
    require_shardable(config)
    session.world.tell(lambda: load_order(session, config, folder, manifest))
    session.world.wait_unseen()
    host = host_mesh()
    spec = ModelSpec(config, session.base, session.device, session.dtype)
    with session.world.together():
        held = hold(spec, host, folder, manifest, session.treatment)
    placement = held.placement(session.execution.pad_id, by_length=session.execution.by_length)
    return ShardedRun(held, placement, session, config.seed)


class ShardedRun:
    """What rank 0 makes all ranks do together, besides steps. It takes the place of the `Probe` of a whole model.

    Args:
        held: rank 0's part.
        placement: how steps are taken.
        seed: the run's seed.
    """

    writers: frozenset[type[nn.Module]] = frozenset()
    can_record = False
    hindrance = ""

    def __init__(self, held: Held, placement: Placement, session: Session, seed: int) -> None:
        self.held = held
        self._placement, self._seed = placement, seed
        self._world, self._layout = session.world, session.layout

    @property
    def is_cut(self) -> bool:
        """Whether no single rank has everything that is trained."""
        return self.held.shards is not None

    def of_model(self) -> Probed:
        """Measure the probe of the model as it is now."""
        self._world.tell(lambda: {"order": MEASURE, "seed": self._seed, "whole": False})
        return self.held.probe(self._seed)

    def again(self, before: Probed, *, records: bool = True) -> Probed:
        """Measure it a second time."""
        del before, records
        return self.of_model()

    def of_copy(self, snapshot: Snapshot) -> Callable[[], Probed]:
        """Measure the probe now: it takes all ranks, which continue to train while the copy is written."""
        del snapshot
        probed = self.of_model()
        return lambda: probed

    def measure(self) -> Measurement:
        """Measure the state as it is now, across all ranks."""
        self._world.tell(lambda: {"order": MEASURE, "seed": self._seed, "whole": True})
        return self.held.measure(self.held.probe(self._seed))

    def commit(self, snapshot: Snapshot) -> Callable[[], GatherContext] | None:
        """Make all ranks copy their shards and begin to write them; return the context that makes the state whole.

        Return None if every rank has everything that is trained, so that nothing has to be made whole.

        Raises:
            NoSpace: it does not fit; the other ranks were told nothing.
        """
        if self.held.shards is None:
            return None
        require_space(self._layout.root, self.bytes_needed(snapshot.size))
        self._world.tell(lambda: {"order": COMMIT})
        return lambda: self._whole(snapshot)

    @contextmanager
    def _whole(self, snapshot: Snapshot) -> Generator[tuple[nn.Module, Snapshot]]:
        held, folder = self.held, self._layout.shards
        assert held.shards is not None
        try:
            self._write(folder / "state", snapshot)
            manifest = read_manifest(folder / "state")
            require_files(folder / "state", manifest)
            whole = whole_state(folder / "state", manifest, held.sharded.bare, snapshot.method, folder)
            yield whole.model, whole.state
        finally:
            remove_tree(folder)

    def _write(self, target: Path, snapshot: Snapshot) -> None:
        try:
            self.held.write(target, snapshot)
        except RuntimeError as error:
            raise RankLost(
                f"a rank was lost while the shards were written: {first_line(error)}",
                where="devices",
                hint="What was committed is kept. onward train goes on from there.",
            ) from error

    def bytes_needed(self, size: int) -> int:
        """Return the bytes that a commit takes on the disk.

        Args:
            size: the bytes of the checkpoint that rank 0 would write alone, of what it holds.
        """
        return size if self.held.shards is None else COPIES * self._world.size * size

    def execution(self, session: Session) -> Execution:
        """Return where and how steps of the run are computed."""
        return replace(session.execution, placement=self._placement)
