"""What can be cut into shards: which layers a model is cut at, and what is refused before anything is cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from onward.config import Config
from onward.errors import ConfigError, ModelError
from onward.training.sharding.model import ShardedModel, decoder_layers
from onward.training.sharding.needs import require_shardable

pytestmark = pytest.mark.shards


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"evaluation": {"share": 0.05}}, "evaluation.share"),
        ({"anchor": {"weight": 0.1}}, "anchor.weight"),
        ({"method": "qlora"}, "sharding"),
        ({"optimizer": "adamw_8bit"}, "optimizer"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_what_shards_do_not_have_is_refused(settings: dict[str, Any], where: str) -> None:
    """Whatever computes on rank 0 alone, and weights that cannot be cut: refused with the key and what to set."""
    with pytest.raises(ConfigError, match=where) as refusal:
        require_shardable(Config.model_validate({"model": "m", "sharding": "full", **settings}))
    assert "sharding: off" in (refusal.value.hint or "")
    require_shardable(Config.model_validate({"model": "m", "sharding": "full"}))


class Layer(nn.Module):
    """A layer that transformers can recompute, with layers of its own."""

    gradient_checkpointing = False

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = nn.ModuleList(inner), nn.Linear(2, 2)


def test_layers_are_the_outermost_ones() -> None:
    """Each once, in their order, however many lists it is in; a layer within another is a part of that one."""
    layers = [Layer(Layer()), Layer(), Layer(nn.Linear(2, 2))]
    model = nn.ModuleDict({"one": nn.ModuleList(layers[:2]), "all": nn.ModuleList([*layers, nn.Linear(2, 2)])})
    assert layers == decoder_layers(model)


def shared() -> nn.Module:
    """Return a model of which two layers share a weight."""
    layers = Layer(), Layer()
    layers[1].norm.weight = layers[0].norm.weight
    return nn.ModuleList(layers)


def shared_with_the_rest() -> nn.Module:
    """Return a model of which a layer shares a weight with what is around the layers."""
    head, layer = nn.Linear(2, 2), Layer()
    layer.norm.weight = head.weight
    return nn.ModuleDict({"head": head, "layers": nn.ModuleList([layer])})


def with_a_weight(weight: torch.Tensor) -> nn.Module:
    """Return a model with a weight in a layer."""
    layer = Layer()
    layer.norm.register_parameter("odd", nn.Parameter(weight, requires_grad=False))
    return nn.ModuleList([layer])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "it has no list of layers that transformers can recompute"),
        (nn.ModuleList([nn.Linear(2, 2)]), "it has no list of layers that transformers can recompute"),
        (shared(), "two of its layers share the weight 0.norm.weight"),
        (shared_with_the_rest(), "two of its layers share the weight head.weight"),
        (with_a_weight(torch.tensor(1.0)), "its weight 0.norm.odd is a single number"),
        (with_a_weight(torch.ones(2, dtype=torch.uint8)), "its weight 0.norm.odd is quantized"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(model: nn.Module, why: str) -> None:
    """Before anything is cut, with the reason and the way out."""
    mesh: Any = SimpleNamespace(device_type="cpu")
    before = dict(model.named_parameters())
    with pytest.raises(ModelError, match=f"the model cannot be cut into shards: {why}") as refusal:
        ShardedModel(model, mesh)
    assert ("sharding", "Set sharding: off.") == (refusal.value.where, refusal.value.hint)
    assert before == dict(model.named_parameters())
