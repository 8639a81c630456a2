"""What the handover compares of a sharded state, measured by all ranks together, with the results of one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from onward.digest import sha256_json
from onward.training.device.environment import deterministic
from onward.training.measuring.fingerprints import fingerprint
from onward.training.measuring.probe import Probed, mean_loss, probe_batches
from onward.training.sharding.gathering import first_gets
from onward.training.sharding.model import ShardedModel
from onward.training.sharding.shards import Shards
from onward.training.sharding.steps import Gradients, InShards, loss_in_shards
from onward.training.state import StateDigest, TrainState, digest_tensors


def probe_in_shards(
    sharded: ShardedModel, gradients: Gradients, dtype: torch.dtype, seed: int, *, exact: bool = True
) -> Probed:
    """Return what `Probe.of_model` measures of the same model on one device; every rank must call this between two
    steps.

    It is measured on the model itself, in evaluation mode: a twin would not be gathered. Buffers are restored after the
    passes, and gradients are dropped.

    Args:
        gradients: the gradients of the model (`InShards`).
        dtype: compute type.
        seed: the run's seed.
        exact: use only deterministic operations.

    Raises:
        TrainingError: the loss is not finite.
    """
    model, device = sharded.model, sharded.device
    loss_of = loss_in_shards(sharded, device, dtype)
    batch, with_gradient = sharded.compute(lambda: probe_batches(model, seed, device))  # it reads the embedding
    in_shards = InShards[Any](sharded, gradients, loss_of)

    def backward(parts: Any) -> torch.Tensor:
        loss = loss_of(parts[0])
        loss.backward()
        return loss

    model.eval()
    try:
        with deterministic(device, exact=exact):
            with torch.no_grad():
                mean = mean_loss(loss_of(batch))
            in_shards.total([[with_gradient]], backward)
        return Probed(mean, _digest(gradients, sharded))
    finally:
        model.train()
        loss_of.forget()
        gradients.begin()


def digest_in_shards(state: TrainState, shards: Shards) -> StateDigest:
    """Return the digest of the whole state, on every rank; every rank must call this, and holds at most one whole
    tensor.

    The digest reads one tensor after another, so each is sent to the first rank: all bytes of the state move once.
    """
    snapshot, mesh = state.view(), shards.mesh
    weights = ((name, name, tensor) for name, tensor in sorted(snapshot.weights.items()))
    moments = (
        (f"{name}.{key}", name, value)
        for name, entry in sorted(snapshot.moments.items())
        for key, value in sorted(entry.items())
    )

    def whole(tensors: Iterable[tuple[str, str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for label, name, tensor in tensors:
            if tensor.ndim == 0:  # the optimizer's counter
                yield label, tensor
                continue
            found = first_gets(mesh, shards[name].shape, shards[name].rows(tensor))
            if found is not None:
                yield label, found

    told = [[digest_tensors(whole(weights)), digest_tensors(whole(moments))]]
    dist.broadcast_object_list(told, group=mesh.get_group(), group_src=0)
    return StateDigest(*told[0])


def _digest(gradients: Gradients, sharded: ShardedModel) -> str:
    own = {name: fingerprint(whole) for name, whole in gradients.wholes()}
    every: list[Any] = [None] * sharded.mesh.size()
    dist.all_gather_object(every, own, group=sharded.mesh.get_group())
    return sha256_json({name: found for each in every for name, found in each.items()})
