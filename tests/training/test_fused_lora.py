"""LoRA layers in one node: PEFT's numbers, and nothing left over from one forward pass to the next."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from onward.training.layers.fused_lora import FusedLoraLinear, fuse_lora
from onward.training.layers.twin import with_weights


class Attention(nn.Module):
    """Three layers with one input, called in the order of a decoder, then one of them on another input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 5), nn.Linear(6, 3, bias=False), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return all outputs side by side."""
        first = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        return torch.cat([first, self.k_proj(first[..., :6]), self.q_proj(x)], -1)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"]])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_layers_with_one_input_compute_what_peft_computes(dropout: float, targets: list[str]) -> None:
    """Layers that share a node give PEFT's outputs and gradients, whichever of them have adapters."""
    outcomes: list[list[torch.Tensor]] = []
    for fused in (False, True):
        torch.manual_seed(0)
        adapter = LoraConfig(r=3, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(Attention(), adapter).train()  # type: ignore[arg-type]
        if fused:
            fuse_lora(model)
        x = torch.randn(2, 7, 6, requires_grad=True)
        torch.manual_seed(1)
        out = model(x)
        out.square().sum().backward()
        outcomes.append([out.detach(), *(t.grad for t in (x, *model.parameters()) if t.grad is not None)])
    assert len(outcomes[0]) == len(outcomes[1]) == 2 + 2 * len(targets)
    for plain, fused in zip(*outcomes, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_fused_layers_compute_what_peft_computes(dropout: float) -> None:
    """A LoRA layer in one node gives PEFT's output and gradients, with the same random numbers for its dropout."""
    outcomes: list[tuple[torch.Tensor, ...]] = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)),  # type: ignore[arg-type]
            LoraConfig(r=3, lora_dropout=dropout, target_modules=["0", "1"], init_lora_weights=False),
        ).train()
        if fused:
            fuse_lora(model)
        assert fused == any(isinstance(layer, FusedLoraLinear) for layer in model.modules())
        x = torch.randn(2, 7, 6, requires_grad=True)
        torch.manual_seed(1)
        out = model(x)
        out.square().sum().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        assert x.grad is not None
        outcomes.append((out.detach(), x.grad, *(gradient for gradient in trained if gradient is not None)))
    assert len(outcomes[0]) == len(outcomes[1]) == 6
    for plain, fused in zip(*outcomes, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def adapted(layers: nn.Module, *, fused: bool = True) -> nn.Module:
    """Return a module with adapters on its q, k and v."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(layers, adapter).train()  # type: ignore[arg-type]
    if fused:
        fuse_lora(model)
    return model


def test_names_order_and_parameters_stay() -> None:
    """A fused model has the very parameters that PEFT made, by the same names in the same order."""
    model = adapted(Attention(), fused=False)
    before, names = dict(model.named_parameters()), [name for name, _ in model.named_modules()]
    fuse_lora(model)
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert [True] * len(before) == [before[name] is parameter for name, parameter in model.named_parameters()]
    assert names == [name for name, _ in model.named_modules()]
    assert list(before) == [name for name in model.state_dict() if name in before]


class Interrupted(Attention):
    """Fails between its layers when told to."""

    fails: type[BaseException] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of q and k."""
        query = self.q_proj(x)
        if self.fails is not None:
            raise self.fails
        return torch.cat([query, self.k_proj(x)], -1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_forward_leaves_nothing_for_the_next(error: type[BaseException]) -> None:
    """After a pass that ended halfway the same input gives what the current weights give, nothing computed before."""
    model = adapted(Interrupted())
    other = copy.deepcopy(model)
    x = torch.randn(2, 7, 6)
    inner: Any = model.get_submodule("base_model.model")
    inner.fails = error
    with pytest.raises(error):
        model(x)
    inner.fails = None
    with torch.no_grad():
        for each in (model, other):
            for parameter in each.parameters():
                parameter.mul_(2)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("fails", [None, RuntimeError])
def test_no_activation_outlives_its_forward(fails: type[BaseException] | None) -> None:
    """When a pass has ended or failed and its result is dropped, neither its input nor an output is kept alive."""
    model = adapted(Interrupted())
    inner: Any = model.get_submodule("base_model.model")
    inner.fails = fails
    alive: list[weakref.ref[torch.Tensor]] = []
    inner.q_proj.register_forward_hook(lambda _m, args, output: alive.extend(map(weakref.ref, (*args, output))))
    try:
        model(torch.randn(2, 7, 6))
    except RuntimeError as error:
        error.__traceback__ = None
    assert [None, None] == [tensor() for tensor in alive]
    assert [None] * 3 == [layer.shared for layer in model.modules() if isinstance(layer, FusedLoraLinear)]


def test_a_layer_called_by_itself_computes_anew() -> None:
    """Outside of a forward pass of the module that holds it a layer takes nothing that another one computed."""
    model = adapted(Attention())
    inner: Any = model.get_submodule("base_model.model")
    x = torch.randn(2, 7, 6)
    inner.q_proj(x)
    with torch.no_grad():
        inner.k_proj.base_layer.weight.mul_(2)
    fresh = x.clone()
    assert torch.equal(inner.k_proj(fresh), inner.k_proj(x))


def test_copies_share_nothing_with_the_original() -> None:
    """A deep copy and a twin for inference compute with their own layers while the original is in its forward pass."""
    model = adapted(Interrupted())
    copied = copy.deepcopy(model)
    doubled = {name: 2 * value.detach() for name, value in model.named_parameters() if value.requires_grad}
    twin = with_weights(model, doubled)
    x = torch.randn(2, 7, 6)
    expected = [copied(x), twin(x), model(x)]
    assert not torch.equal(expected[1], expected[2])
    seen: list[torch.Tensor] = []
    query = model.get_submodule("base_model.model.q_proj")

    def look(module: nn.Module, _args: object, _output: object) -> None:
        if module is query:  # the twin has its hooks too
            seen.extend((copied(x), twin(x)))

    query.register_forward_hook(look)
    seen.append(model(x))
    assert [True] * 3 == [torch.equal(*pair) for pair in zip(expected, seen, strict=True)]
