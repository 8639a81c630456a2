"""What one rank holds of a run with a sharded model: its part of the state, and how steps are taken with it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from onward.training.checkpoints.checkpoint import Manifest
from onward.training.checkpoints.loading import load_rest
from onward.training.measuring.handover import Measurement
from onward.training.measuring.probe import Probed
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.model.treatment import Treatment
from onward.training.sharding.exchange import WholeExchange
from onward.training.sharding.files import write_shards
from onward.training.sharding.loading import load_sharded
from onward.training.sharding.measuring import digest_in_shards, probe_in_shards
from onward.training.sharding.model import ShardedModel
from onward.training.sharding.needs import require_shardable
from onward.training.sharding.shards import Shards
from onward.training.sharding.state import start_sharded
from onward.training.sharding.steps import Gradients, InShards, loss_in_shards
from onward.training.state import Snapshot, TrainState

LONGEST = timedelta(minutes=10)
"""How long a collective within a step may take: ranks reach it almost together, and one that never does must end."""


@dataclass(frozen=True)
class Held:
    """A rank's part of a run.

    Args:
        state: on each rank only its rows; with an adapter, the same on every rank.
        gradients: where the gradients of a step go.
        host: all ranks with main memory as their device.
        dtype: compute type.
        exact: use only deterministic operations.
    """

    sharded: ShardedModel
    state: TrainState
    gradients: Gradients
    host: DeviceMesh
    dtype: torch.dtype
    exact: bool

    @property
    def shards(self) -> Shards | None:
        """The shards of what is trained; None if every rank has all of it."""
        return self.gradients if isinstance(self.gradients, Shards) else None

    def probe(self, seed: int) -> Probed:
        """Return the same as `Probe.of_model`; every rank must call this between two steps."""
        return probe_in_shards(self.sharded, self.gradients, self.dtype, seed, exact=self.exact)

    def placement(self, pad_id: int, *, by_length: bool) -> InShards[Any]:
        """Return how the trainer takes steps; every rank must call this. The arguments are those of `Execution`."""
        loss = loss_in_shards(self.sharded, self.sharded.device, self.dtype, pad_id, by_length=by_length)
        return InShards(self.sharded, self.gradients, loss)

    def measure(self, probed: Probed) -> Measurement:
        """Return the measurement of the whole state; every rank must call this."""
        state, shards = self.state, self.shards
        digest = state.view().digest() if shards is None else digest_in_shards(state, shards)
        count = state.view().adam_step()
        return Measurement(digest.weights, digest.moments, count, state.learning_rate, probed.loss, probed.gradient)

    def write(self, target: Path, snapshot: Snapshot) -> None:
        """Write a copy of this rank's shards; every rank must call this at once. See `write_shards`."""
        assert self.shards is not None
        write_shards(target, snapshot, self.shards, self.host)


def hold(
    spec: ModelSpec, host: DeviceMesh, folder: Path | None, manifest: Manifest | None, treatment: Treatment | None
) -> Held:
    """Build this rank's part of a run, as every rank does; ranks do not communicate meanwhile, so one may fail alone.

    Args:
        host: `host_mesh()`.
        folder: the checkpoint, or what a new run starts from, if anything.
        manifest: the checkpoint's manifest; None for a new run.

    Raises:
        ConfigError: the config asks for something that sharding does not support.
        DamagedState: the checkpoint is not what its manifest says.
        ModelError: the model cannot be loaded or sharded.
    """
    require_shardable(spec.config)
    group: Any = distributed.new_group(timeout=LONGEST, group_desc="onward-weights")
    mesh = DeviceMesh.from_group(group, spec.device.type)
    if manifest is not None and spec.config.method == "full":
        assert folder is not None
        sharded, state, shards = load_sharded(folder, manifest, spec, mesh, treatment=treatment)
        return Held(sharded, state, shards, host, spec.dtype, spec.config.deterministic)
    sharded = ShardedModel(build_model(spec, checkpoint=folder, treatment=treatment, mapped=True), mesh)
    if spec.config.method == "full":
        state, shards = start_sharded(sharded, spec.config)
        return Held(sharded, state, shards, host, spec.dtype, spec.config.deterministic)
    state = TrainState.start(sharded.model, spec.config)
    if manifest is not None:
        assert folder is not None
        load_rest(state, state.view().describe_parameters(), folder, manifest, spec.config)
    return Held(
        sharded, state, WholeExchange(state.parameters, mesh.get_group()), host, spec.dtype, spec.config.deterministic
    )
