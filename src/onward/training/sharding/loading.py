"""Loads a checkpoint into shards: every rank maps the whole files, but copies only its part of them."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from onward.training.checkpoints.checkpoint import Manifest
from onward.training.checkpoints.loading import load_rest
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.model.treatment import Treatment
from onward.training.sharding.model import ShardedModel
from onward.training.sharding.shards import Shards
from onward.training.sharding.state import start_sharded
from onward.training.state import TrainState


def load_sharded(
    folder: Path, manifest: Manifest, spec: ModelSpec, mesh: DeviceMesh, *, treatment: Treatment | None = None
) -> tuple[ShardedModel, TrainState, Shards]:
    """Build a rank's part of the TrainState of a verified checkpoint; every rank must call this.

    Weights and moments are mapped from their files, and only this rank's part is copied.

    Raises:
        DamagedState: names, shapes or types are not those of the manifest.
        ModelError: the model cannot be sharded.
        Unreadable: a file cannot be read now.
    """
    model = build_model(spec, checkpoint=folder, treatment=treatment, mapped=True)
    sharded = ShardedModel(model, mesh)
    state, shards = start_sharded(sharded, spec.config)
    load_rest(state, shards.describe(), folder, manifest, spec.config, shards)
    return sharded, state, shards
