"""Steps in bfloat16: LoRA layers in one node and a head in chunks, held against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rows import CPU, batch, tiny_model
from torch import nn
from torch.nn import functional

from onward.training.layers import cross_entropy
from onward.training.layers.attention import ROW_ATTENTION
from onward.training.layers.cross_entropy import linear_cross_entropy
from onward.training.layers.fused_lora import FusedLoraLinear, fuse_lora, fused_layers, lowered
from onward.training.layers.matmul import product_in_float
from onward.training.steps.loss import TargetLoss

HALF = torch.bfloat16


class Siblings(nn.Module):
    """Three layers with one input, as in a decoder's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 48, bias=bias) for bias in (True, False, True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of their outputs."""
        return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)


def adapted(*, fused: bool) -> nn.Module:
    """Return a frozen model in bfloat16 with adapters in float32; equal but for the node."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(Siblings().to(HALF), adapter).train()  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    if fused:
        fuse_lora(model)
    return model


def gradients(model: nn.Module, x: torch.Tensor, *, half: bool = True) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss, by name, in float64."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", HALF, enabled=half):
        out = model(x)
    out.double().square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"input": x.grad.double(), **found}


def errors(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the relative error of each gradient."""
    assert actual.keys() == exact.keys()
    return {name: float((actual[name] - value).norm() / value.norm()) for name, value in exact.items()}


def test_the_node_is_as_exact_as_peft_in_bfloat16() -> None:
    """Held against float64 no gradient is further away than PEFT's under autocast, and all stay float32."""
    torch.manual_seed(1)
    x = torch.randn(2, 50, 64).to(HALF)
    exact = gradients(adapted(fused=False).double(), x.double(), half=False)
    plain = errors(gradients(adapted(fused=False), x), exact)
    model = adapted(fused=True)
    assert 3 == len(fused_layers(model))
    assert {torch.float32} == {p.dtype for p in model.parameters() if p.requires_grad}
    node = errors(gradients(model, x), exact)
    assert max(node.values()) < 1e-2
    assert [] == [(name, node[name], plain[name]) for name in node if node[name] > 1.05 * plain[name]]


def test_adapters_are_cast_at_once_for_a_pass() -> None:
    """One cast for all layers gives the bits of a cast in each, and nothing of it remains."""
    torch.manual_seed(1)
    x, model = torch.randn(2, 9, 64).to(HALF), adapted(fused=True)
    layers = fused_layers(model)
    alone = gradients(model, x)
    model.zero_grad()
    with lowered(layers, HALF):
        assert [HALF] * 3 == [layer.adapters_in(HALF)[0].dtype for layer in layers]
        assert all(layer.low is not None and layer.adapters_in(HALF)[0] is layer.low[0] for layer in layers)
        together = gradients(model, x)
    assert [] == [name for name, gradient in alone.items() if not torch.equal(gradient, together[name])]
    assert [None] * 3 == [layer.low for layer in layers]
    with lowered(layers, torch.float32):
        assert [None] * 3 == [layer.low for layer in layers]


def test_without_autocast_a_layer_computes_in_the_type_of_its_base() -> None:
    """As an evaluation may: what comes out has the type that the base layer's output has."""
    model = adapted(fused=True).eval()
    with torch.no_grad():
        assert HALF == model(torch.randn(3, 64).to(HALF)).dtype
        assert torch.float32 == copy.deepcopy(model).float()(torch.randn(3, 64)).dtype


@pytest.mark.parametrize("tokens", [8, 64])
def test_chunks_of_a_head_do_not_add_their_errors_up(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of a trained head are summed in float32: in eight chunks they are as exact as in one."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).to(HALF), torch.randn(50, 32)
    labels = torch.randint(0, 50, (64,))
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 4 * 50 * tokens)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(h, w, labels, HALF)
    loss.backward()
    exact_h, exact_w = hidden.double().requires_grad_(), weight.to(HALF).double().requires_grad_()
    exact = functional.cross_entropy(exact_h @ exact_w.T, labels, reduction="sum")
    exact.backward()
    found = errors(
        {"h": h.grad.double(), "w": w.grad.double()},  # type: ignore[union-attr]
        {"h": exact_h.grad, "w": exact_w.grad},  # type: ignore[dict-item]
    )
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    assert found["w"] < 1.2e-3  # summed in bfloat16 it was twice that and more
    assert found["h"] < 2.5e-3


def test_products_of_half_types_are_not_rounded() -> None:
    """Their float32 result is that of exact factors: products of two bfloat16 numbers need no more digits."""
    torch.manual_seed(0)
    left, right = torch.randn(7, 33).to(HALF), torch.randn(33, 5).to(HALF)
    exact = left.double() @ right.double()
    torch.testing.assert_close(product_in_float(left, right).double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.float32 == product_in_float(left, right).dtype
    assert torch.equal(left.float() @ right.float(), product_in_float(left.float(), right.float()))


def test_a_step_in_bfloat16_is_near_one_in_float32() -> None:
    """A whole model with adapters, rows end to end: the loss is near, and gradients are float32."""
    found: list[torch.Tensor] = []
    for dtype in (torch.float32, HALF):
        torch.manual_seed(1)
        base = tiny_model("llama", ROW_ATTENTION).to(dtype)
        adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, adapter).float() if dtype == torch.float32 else get_peft_model(base, adapter)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        fuse_lora(model)
        assert any(isinstance(part, FusedLoraLinear) for part in model.modules())
        loss = TargetLoss(model, CPU, dtype)(batch(9, 2, 17))
        loss.backward()
        assert {torch.float32} == {p.grad.dtype for p in model.parameters() if p.grad is not None}
        found.append(loss.detach())
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=0.0)
