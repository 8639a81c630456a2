"""The loss over target tokens: rows laid end to end, in chunks, in one node, and equal to the plain way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from onward.data.loader import Batch
from onward.data.tokenized import Row
from onward.training import cross_entropy
from onward.training.attention import PADDING_FREE, ROW_ATTENTION
from onward.training.cross_entropy import linear_cross_entropy
from onward.training.fused_lora import FusedLoraLinear, fuse_lora
from onward.training.loss import TargetLoss
from onward.training.matmul import LARGE, times

CPU = torch.device("cpu")
VOCABULARY = 60


def batch(*lengths: int, seed: int = 0) -> Batch:
    """Return rows of these lengths with random tokens, every third of which is no target."""
    generator = np.random.default_rng(seed)
    rows = [
        Row(generator.integers(3, VOCABULARY, length), (np.arange(length) % 3 > 0) | (np.arange(length) == 1))
        for length in lengths
    ]
    return Batch(rows, list(range(len(rows))), list(range(len(rows))))


def tiny_model(model_type: str, attention: str, **settings: Any) -> nn.Module:
    """Return a random model of two layers; equal for equal settings."""
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def loss_and_gradients(model: nn.Module, rows: Batch, *, padded: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradient of every trained parameter."""
    target_loss = TargetLoss(model, CPU, torch.float32)
    target_loss._padding_free = not padded  # type: ignore[attr-defined]
    loss = target_loss(rows)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients


@pytest.mark.parametrize("model_type", sorted(PADDING_FREE))
def test_rows_end_to_end_are_rows_by_themselves(model_type: str) -> None:
    """For every model type on the list the loss and its gradients are those of padded rows."""
    settings = {"sliding_window": 5} if model_type in ("mistral", "starcoder2", "phi3") else {}
    rows = batch(9, 2, 17, 6)
    loss, gradients = loss_and_gradients(tiny_model(model_type, ROW_ATTENTION, **settings), rows, padded=False)
    plain, expected = loss_and_gradients(tiny_model(model_type, "sdpa", **settings), rows, padded=True)
    assert loss == pytest.approx(plain, rel=1e-6)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("model_type", sorted(PADDING_FREE))
def test_a_row_does_not_see_the_others(model_type: str) -> None:
    """What stands in one row changes no bit of what the model computes for another."""
    model = tiny_model(model_type, ROW_ATTENTION).eval()
    first, second = batch(7, 9, 5), batch(7, 9, 5, seed=1)
    changed = Batch([second.rows[0], first.rows[1], second.rows[2]], first.references, first.lines)
    hidden: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda _m, _i, output: hidden.append(output.last_hidden_state[0, 7:16]))
    with torch.no_grad():
        TargetLoss(model, CPU, torch.float32)(first)
        TargetLoss(model, CPU, torch.float32)(changed)
    assert torch.equal(hidden[0], hidden[1])


def test_chunks_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a trained head and its gradients are those of the whole logits, however many chunks there are."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(13, 8), torch.randn(VOCABULARY, 8), torch.randint(0, VOCABULARY, (13,))
    outcomes: list[tuple[torch.Tensor, ...]] = []
    for chunk in (5, 13, 100, None):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunk is None:
            loss = functional.cross_entropy(h @ w.T, labels, reduction="sum")
        else:
            monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 4 * VOCABULARY * chunk)
            loss = linear_cross_entropy(h, w, labels)
        (loss / 3).backward()
        assert h.grad is not None
        assert w.grad is not None
        outcomes.append((loss.detach(), h.grad, w.grad))
    for outcome in outcomes[:-1]:
        for value, expected in zip(outcome, outcomes[-1], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [5, 17, VOCABULARY])
def test_a_frozen_head_by_parts_of_its_vocabulary(monkeypatch: pytest.MonkeyPatch, words: int) -> None:
    """The loss of a frozen head and its gradient are those of the whole logits, also where these are far apart."""
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "WORDS", words)
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", {"cpu": 0})
    weight, labels = torch.randn(VOCABULARY, 8), torch.randint(0, VOCABULARY, (13,))
    hidden = (torch.randn(13, 8) * torch.logspace(-2, 2, 13)[:, None]).requires_grad_()
    expected = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(expected / 3, hidden)
    loss = linear_cross_entropy(hidden, weight, labels)
    (loss / 3).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels) == loss


def test_a_product_has_the_same_bits_wherever_it_lies() -> None:
    """A large product is that of PyTorch but for rounding; no bit of it depends on where in memory its factors lie."""
    rows, into, out = 300, 512, 1024
    assert rows * into * out >= LARGE
    x, weight = torch.randn(rows, into), torch.randn(out, into)
    product = times(x, weight)
    torch.testing.assert_close(product, x @ weight.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(times(x, weight.T.contiguous().T), x @ weight.T, rtol=1e-4, atol=1e-3)
    for shift in (1, 4, 9, 16):
        moved = torch.zeros(x.numel() + shift)[shift:].view_as(x).copy_(x)
        other = torch.zeros(weight.numel() + 3 * shift)[3 * shift :].view_as(weight).copy_(weight)
        assert torch.equal(times(moved, other), product)


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
