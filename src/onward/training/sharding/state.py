"""The TrainState of a sharded model: on each rank only its rows, with an optimizer over them."""

from __future__ import annotations

from onward.config import Config
from onward.training.optimizers import optimizer_method
from onward.training.sharding.model import ShardedModel
from onward.training.sharding.shards import Shards
from onward.training.state import TrainState


def start_sharded(sharded: ShardedModel, config: Config) -> tuple[TrainState, Shards]:
    """Return the state of step 0 of a fully trained model, and the shards that make it up.

    Weights, moments and copies of the state are this rank's, in the layout of `Shard.held`.
    """
    method = optimizer_method(config)
    shards = Shards(sharded, method)
    optimizer = method.build(sharded.model, config)
    held = {id(shard.weight): shard.held for shard in shards.values()}
    for group in optimizer.param_groups:  # it has no state yet
        group["params"] = [held[id(parameter)] for parameter in group["params"]]
    return TrainState(
        sharded.model, optimizer, method, held={name: shard.held for name, shard in shards.items()}
    ), shards
