"""A sharded model: every decoder layer is gathered only while it computes.

Based on FSDP2 (`fully_shard`; Zhao et al., 2023, "PyTorch FSDP"). Weights keep the type in which one device holds them,
even in transit, so that a forward pass under autocast gives the bits of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from onward.errors import ModelError
from onward.training.layers.recompute import FLAG
from onward.training.layers.twin import with_weights
from onward.training.sharding.exchange import Exchange

Result = TypeVar("Result")


class ShardedModel:
    """A model whose weights are sharded over the ranks of a mesh. Every rank makes it from the same model.

    What is trained with a frozen base (an adapter) stays whole on every rank: it is small, and is then written,
    measured and clipped as on one device.

    Args:
        model: a causal language model, with or without an adapter; its parameters are replaced by shards. In full
            training, its weights may be in the type of their files; their shards are in float32.
        mesh: the ranks, in one dimension, and their kind of device.

    Raises:
        ModelError: the model cannot be sharded.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        layers = decoder_layers(model)
        self.model = model
        self.mesh = mesh
        self.device = _device_of(mesh)
        self.kept_whole = _kept_whole(model)
        _require_apart(model, layers, self.kept_whole)
        self.bare = _bare(model)
        """The model's structure, names and buffers, without the memory of its weights."""
        with torch.no_grad():
            for layer in layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=self.kept_whole)
            self._whole = _Whole(model)
            fully_shard(self._whole, mesh=mesh, ignored_params=self.kept_whole)
            if not isinstance(model, PeftModel) and any(weight.dtype != torch.float32 for weight in model.parameters()):
                self._whole.float()
            for parameter in self.kept_whole:
                parameter.data = parameter.data.to(self.device)
        self._root = cast(FSDPModule, self._whole)
        self.exchange = Exchange(self._whole, layers)

    def compute(self, function: Callable[[], Result]) -> Result:
        """Return what a function computes with the model. Every rank must call this at once, with any function that
        runs the same layers in the same order.

        The weights outside the decoder layers (embedding, norm, head) are whole meanwhile, so the function may read
        them. They stay so until the backward pass of a loss that it returns. Autocast keeps no copies of weights, which
        would add up to the whole model.

        Raises:
            Exception: what the function raises; the model is sharded again.
        """
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            result = self._whole(function)
        except BaseException:
            self.forget()
            raise
        finally:
            torch.set_autocast_cache_enabled(caches)
        if not _has_graph(result):
            self._root.reshard()  # no backward pass will
        return result

    def forget(self) -> None:
        """Drop what an interrupted pass left, including gradients; weights are sharded again."""
        cast(Any, self._root).reset_iter_state()
        self.exchange.begin()


def _has_graph(result: object) -> bool:
    return isinstance(result, torch.Tensor) and result.requires_grad


class _Whole(nn.Module):
    """The root module of the shards: it runs any function it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that transformers can recompute, the outermost ones, each once.

    Raises:
        ModelError: it has none.
    """
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    found = [layer for layers in lists for layer in layers if isinstance(getattr(layer, FLAG, None), bool)]
    inner = {part for layer in found for part in layer.modules() if part is not layer}
    layers = [layer for layer in dict.fromkeys(found) if layer not in inner]
    if not layers:
        raise _refusal("it has no list of layers that transformers can recompute")
    return layers


def _kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Return what is trained with a frozen base."""
    if not isinstance(model, PeftModel):
        return set()
    return {parameter for parameter in model.parameters() if parameter.requires_grad}


def _device_of(mesh: DeviceMesh) -> torch.device:
    kind = mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _bare(model: nn.Module) -> nn.Module:
    """Return a model without memory for its weights; one with an adapter is not needed."""
    shapes = {name: torch.empty_like(weight, device="meta") for name, weight in model.named_parameters()}
    return with_weights(model, shapes)


def _require_apart(model: nn.Module, layers: Collection[nn.Module], kept_whole: Collection[nn.Parameter]) -> None:
    """Refuse weights shared by two layers, or by a layer and the rest of the model, and what FSDP2 cannot shard."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    inside = {part: layer for layer in layers for part in layer.modules()}
    for part in model.modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(inside.get(part, model))
    for name, parameter in model.named_parameters():
        if parameter in kept_whole:
            continue
        if len(owners[parameter]) > 1:
            raise _refusal(f"two of its layers share the weight {name}")
        if parameter.ndim == 0:
            raise _refusal(f"its weight {name} is a single number")
        if not parameter.dtype.is_floating_point:
            raise _refusal(f"its weight {name} is quantized")


def _refusal(why: str) -> ModelError:
    return ModelError(f"the model cannot be cut into shards: {why}", where="sharding", hint="Set sharding: off.")
