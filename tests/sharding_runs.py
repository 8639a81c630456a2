"""A few steps of one model, on one device or in shards on several ranks: what tests of sharding compare."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from checkpoints import RUN
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference, make_plan
from onward.data.tokenized import Row
from onward.errors import RankLost, VerificationFailed
from onward.ranks import place_here
from onward.training.checkpoints.checkpoint import Contents, Facts, Manifest, inspect_checkpoint
from onward.training.device.execution import Execution
from onward.training.layers.recompute import Recomputation
from onward.training.layers.rope import EVERY_LENGTH
from onward.training.measuring.handover import measure
from onward.training.measuring.probe import Probe, Probed
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.ranks.exchange import InTurn
from onward.training.ranks.forming import form
from onward.training.seeds import seeded
from onward.training.sharding.exchange import WholeExchange
from onward.training.sharding.files import host_mesh, write_shards
from onward.training.sharding.loading import load_sharded
from onward.training.sharding.measuring import digest_in_shards, probe_in_shards
from onward.training.sharding.model import ShardedModel, decoder_layers
from onward.training.sharding.state import start_sharded
from onward.training.sharding.steps import InShards, loss_in_shards
from onward.training.state import Cursor, Snapshot, TrainState
from onward.training.steps.loss import TargetLoss
from onward.training.steps.parts import Part
from onward.training.trainer import Trainer

CPU = torch.device("cpu")
LENGTHS = (9, 14)
PROBE_SEED = 3
FILE_BYTES = 1 << 14
"""Bytes of tensors that share a file of shards: a few files for each rank."""
LIMIT = 0.5
"""Norm that gradients are clipped to; theirs is above it."""


def config_of(folder: Path, method: str) -> Config:
    """Return the config of the runs that are compared; an adapter trains rows of the embedding, too."""
    values = {"model": str(folder), "method": method, "learning_rate": 1e-2, "seed": 1}
    lora = {"rank": 2, "dropout": 0.1, "trainable_tokens": [3, 4]}
    return Config.model_validate(values | ({"lora": lora} if method == "lora" else {}))


def shares_of_step(step: int) -> list[list[Part]]:
    """Return the shares of a step, a function of its number; one of them is computed in two parts."""
    return [[_part(step, 0)], [_part(step, 1), _part(step, 2)], [_part(step, 3)], [_part(step, 4)]]


def _part(step: int, number: int) -> Part:
    draw = np.random.default_rng((step, number))
    rows = [Row(draw.integers(0, 250, length), np.arange(length) > 0) for length in LENGTHS]
    references = [RowReference("file", place) for place in range(len(rows))]
    return Part(Batch(rows, references, list(range(len(rows)))), 100 * step + number)


def built(folder: Path, method: str, dtype: torch.dtype) -> tuple[Config, nn.Module]:
    """Return config and model of a run."""
    config = config_of(folder, method)
    return config, build_model(ModelSpec(config, folder, CPU, dtype))


def finish(state: TrainState, loss: torch.Tensor, norm: torch.Tensor) -> list[float]:
    """Take the optimizer's step and count it; returns loss and norm."""
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.counters.step += 1
    return [float(loss), float(norm)]


def on_one_device(
    folder: Path, method: str, steps: int, dtype: torch.dtype = torch.float32
) -> tuple[TrainState, list[list[float]]]:
    """Train some steps on one device, share after share; returns the state, and loss and norm of each step."""
    config, model = built(folder, method, dtype)
    state, told = TrainState.start(model, config), []
    loss_of = TargetLoss(model, CPU, dtype)
    for step in range(steps):
        train = partial(train_part, loss_of=loss_of)
        total = InTurn().total(shares_of_step(step), partial(train_share, train), state.parameters.values())
        told.append(finish(state, total, nn.utils.clip_grad_norm_(state.parameters.values(), LIMIT)))
    return state, told


def measured_on_one_device(state: TrainState) -> list[object]:
    """Return loss and digest of the gradient of a state's probe, and the digests of weights and moments."""
    probed, digest = Probe(state.model, PROBE_SEED, CPU, torch.float32).of_model(), state.view().digest()
    return [probed.loss, probed.gradient, digest.weights, digest.moments]


def train_share(train: Callable[[Part], torch.Tensor], share: Sequence[Part]) -> torch.Tensor:
    """Compute the loss of a share and its gradients."""
    total = torch.zeros(())
    for part in share:
        total += train(part)
    return total


def train_part(part: Part, loss_of: TargetLoss) -> torch.Tensor:
    """Compute the loss of a part and its gradients."""
    with seeded(part.seed, CPU):
        loss = loss_of(part.batch) / 100
        loss.backward()
    return loss.detach()


def in_group(function: Callable[..., None], *arguments: object) -> None:
    """On each of several ranks: call a function with a group of all of them."""
    dist.init_process_group("gloo")
    function(*arguments)
    dist.destroy_process_group()


def train_in_shards(
    folder: Path, steps: range, source: Path | None, target: Path, dtype: torch.dtype, recomputed: bool
) -> None:
    """Start from a model or load a checkpoint into shards, train some steps, and write the shards."""
    config = config_of(folder, "full")
    spec, mesh = ModelSpec(config, folder, CPU, dtype), init_device_mesh("cpu", (dist.get_world_size(),))
    if source is None:
        sharded = ShardedModel(build_model(spec), mesh)
        state, shards = start_sharded(sharded, config)
    else:
        sharded, state, shards = load_sharded(source, verified(source), spec, mesh)
    loss_of, recomputation = loss_in_shards(sharded, CPU, dtype), Recomputation(sharded.model)
    in_shards = InShards[Part](sharded, shards, loss_of)
    told: list[list[float]] = []

    def train(parts: Sequence[Part]) -> torch.Tensor:
        with recomputation.on(recomputed):
            return train_part(parts[0], loss_of)

    for step in steps:
        loss = in_shards.total(shares_of_step(step), train)
        told.append(finish(state, loss, in_shards.clip(LIMIT)))
        in_shards.stepped()
    write_shards(target, state.snapshot(), shards, host_mesh(), file_bytes=FILE_BYTES)
    probed, digest = probe_in_shards(sharded, shards, dtype, PROBE_SEED), digest_in_shards(state, shards)
    if dist.get_rank() == 0:
        target.with_suffix(".json").write_text(json.dumps(told))
        found = [probed.loss, probed.gradient, digest.weights, digest.moments]
        target.with_suffix(".measured").write_text(json.dumps(found))


def file_config(folder: Path) -> Config:
    """Return the config of a file that is trained in three shares a step, some of them in several parts, with some
    weights of each layer and of what is around them frozen."""
    values = {"model": str(folder), "method": "full", "learning_rate": 1e-2, "seed": 1, "warmup_steps": 0}
    values["train"] = ["mlp", "embed"]
    cut = {"batch_size": 6, "parts": 3, "micro_batch_tokens": 32, "activation_checkpointing": "on"}
    return Config.model_validate({**values, **cut, "max_grad_norm": LIMIT})


def take_steps(trainer: Trainer) -> list[list[float]]:
    """Take the steps of a small file; returns loss and norm of each."""
    plan = make_plan("00", 11, trainer.config)
    trainer.state.cursor = Cursor(1, "00", 0, plan.steps)
    told: list[list[float]] = []
    for step in range(plan.steps):
        references = plan.rows_at(step)
        lengths = [9 + 2 * reference.row for reference in references]
        rows = [Row(np.arange(length) * (step + 3) % 250, np.arange(length) > 0) for length in lengths]
        taken = trainer.take_step(Batch(rows, references, [reference.row for reference in references]), plan)
        told.append([taken.loss, taken.grad_norm])
    return told


def train_file(folder: Path, target: Path) -> None:
    """On each of several ranks: take the steps of a file with the trainer, on a model in shards, and write it."""
    place = place_here()
    assert place is not None
    group, config = form(place, 60.0, print), file_config(folder)
    model = build_model(ModelSpec(config, folder, CPU, torch.float32), mapped=True)
    sharded = ShardedModel(model, init_device_mesh("cpu", (place.size,)))
    state, shards = start_sharded(sharded, config)
    placement = InShards[Any](sharded, shards, loss_in_shards(sharded, CPU, torch.float32))
    execution, host = Execution(group, torch.float32, placement=placement), host_mesh()
    write_shards(target.with_suffix(".start"), state.snapshot(), shards, host)
    told = take_steps(Trainer(state, config, execution))
    write_shards(target, state.snapshot(), shards, host)
    target.with_suffix(f".{place.rank}").write_text(json.dumps(told))
    group.end()


def contents_of(model: nn.Module, state: Snapshot, base: Path) -> Contents:
    """Return what a checkpoint of a state is written from, its measurement apart from the probe included."""
    facts = Facts(RUN, {"name": str(base), "digest": "d"}, "t", {"device": "cpu"}, {"tokenizer.json": b"{}"})
    return Contents(model, state, config_of(base, "full"), measure(state, Probed(1.0, "")), facts)


def verified(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint whose files are as it states."""
    manifest = inspect_checkpoint(checkpoint).verified
    assert manifest is not None
    return manifest


def cut_checkpoint(base: Path, checkpoint: Path, target: Path) -> None:
    """Load a checkpoint into shards, and write those."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spec = ModelSpec(config_of(base, "full"), base, CPU, torch.float32)
    _, state, shards = load_sharded(checkpoint, verified(checkpoint), spec, mesh)
    write_shards(target, state.snapshot(), shards, host_mesh())


def lose_a_rank(folder: Path, target: Path) -> None:
    """Write the shards of a new model; rank 1 is killed when its turn comes, and the others end with an error."""
    config, model = built(folder, "full", torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state, shards = start_sharded(ShardedModel(model, mesh), config)

    def die() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    write_shards(target, replace(state.snapshot(), wait=die), shards, host_mesh())


def fail_in_a_layer(folder: Path, told: Path) -> None:
    """Rank 1 fails before the second layer of its part, where the others wait for it; says what each rank met."""
    config, model = built(folder, "full", torch.float32)
    sharded = ShardedModel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    _, shards = start_sharded(sharded, config)
    loss_of = loss_in_shards(sharded, CPU, torch.float32)

    def fail(*_: object) -> None:
        raise ValueError("a cable was pulled")

    if dist.get_rank() == 1:
        decoder_layers(model)[1].register_forward_pre_hook(fail)
    try:
        train = partial(train_part, loss_of=loss_of)
        InShards[Part](sharded, shards, loss_of).total(shares_of_step(0), partial(train_share, train))
    except RankLost as error:
        told.with_suffix(f".{dist.get_rank()}").write_text(error.what)
        os._exit(error.exit_status)


def write_apart(folder: Path, target: Path, met: Path) -> None:
    """Write the shards of a new model of which rank 1 counted a step more; says what each rank met."""
    config, model = built(folder, "full", torch.float32)
    state, shards = start_sharded(ShardedModel(model, init_device_mesh("cpu", (dist.get_world_size(),))), config)
    state.counters.step += dist.get_rank()
    try:
        write_shards(target, state.snapshot(), shards, host_mesh())
    except VerificationFailed as error:
        met.with_suffix(f".{dist.get_rank()}").write_text(error.what)


def say_where_weights_lie(folder: Path, target: Path) -> None:
    """Say of each moment whether all weights of layers lie in shards, and those around them, and whether autocast keeps
    copies."""
    _, model = built(folder, "full", torch.float32)
    sharded = ShardedModel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    ids = torch.arange(9)[None]

    def now() -> list[bool]:
        layers = {weight for layer in decoder_layers(model) for weight in layer.parameters()}
        around = set(model.parameters()) - layers
        lie = [all(isinstance(weight, DTensor) for weight in weights) for weights in (layers, around)]
        return [*lie, torch.is_autocast_cache_enabled()]

    def look() -> list[bool]:
        model(input_ids=ids)
        return now()

    def fail() -> None:
        look()
        raise ValueError

    told = {"before": now(), "in a look": sharded.compute(torch.no_grad()(look)), "after a look": now()}
    with contextlib.suppress(ValueError):
        sharded.compute(fail)
    told["after a failure"] = now()
    loss: torch.Tensor = sharded.compute(lambda: model(input_ids=ids).logits.sum())
    told["before the backward pass"] = now()
    loss.backward()
    told["after it"] = now()
    target.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(told))


def fill_a_disk(folder: Path, target: Path, met: Path) -> None:
    """Write the shards of a new model where rank 1 may write small files alone; says what each rank met."""
    config, model = built(folder, "full", torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state, shards = start_sharded(ShardedModel(model, mesh), config)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        write_shards(target, state.snapshot(), shards, host_mesh())
    except OSError as error:
        met.with_suffix(f".{dist.get_rank()}").write_text(str(error.errno))
    finally:  # what measures coverage writes more
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def train_beside_shards(folder: Path, steps: int, target: Path) -> None:
    """Train an adapter, whole on every rank, alongside a base in shards."""
    config = config_of(folder, "lora")
    model = build_model(ModelSpec(config, folder, CPU, torch.float32), mapped=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = ShardedModel(model, mesh)
    assert all(isinstance(weight, DTensor) != weight.requires_grad for weight in model.parameters())
    state = TrainState.start(model, config)
    assert EVERY_LENGTH == loss_in_shards(sharded, CPU, torch.float32, by_length=True).layout.angles
    loss_of = loss_in_shards(sharded, CPU, torch.float32)
    exchange = WholeExchange(state.parameters, mesh.get_group())
    in_shards = InShards[Part](sharded, exchange, loss_of)
    told: list[list[float]] = []
    for step in range(steps):
        loss = in_shards.total(shares_of_step(step), lambda parts: train_part(parts[0], loss_of))
        told.append(finish(state, loss, in_shards.clip(LIMIT)))
    probed, digest = probe_in_shards(sharded, exchange, torch.float32, PROBE_SEED), state.view().digest()
    found = [probed.loss, probed.gradient, digest.weights, digest.moments, told]
    target.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(found))
