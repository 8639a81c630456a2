"""The loss over target tokens: rows laid end to end, in chunks, in one node, and equal to the plain computation."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rows import CPU, VOCABULARY, batch, loss_and_gradients, tiny_model
from torch.nn import functional

from onward.data.plan.loader import Batch
from onward.training.layers import cross_entropy
from onward.training.layers.attention import PADDING_FREE, ROW_ATTENTION
from onward.training.layers.cross_entropy import linear_cross_entropy
from onward.training.layers.matmul import LARGE, times
from onward.training.steps.loss import TargetLoss


@pytest.mark.parametrize("model_type", sorted(PADDING_FREE))
def test_rows_end_to_end_are_rows_by_themselves(model_type: str) -> None:
    """For every model type on the list the loss and its gradients are those of padded rows."""
    settings = {"sliding_window": 5} if model_type in ("mistral", "starcoder2", "phi3") else {}
    rows = batch(9, 2, 17, 6)
    loss, gradients = loss_and_gradients(tiny_model(model_type, ROW_ATTENTION, **settings), rows)
    plain, expected = loss_and_gradients(tiny_model(model_type, "sdpa", **settings), rows)
    assert loss == pytest.approx(plain, rel=1e-6)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("model_type", sorted(PADDING_FREE))
def test_a_row_does_not_see_the_others(model_type: str) -> None:
    """The content of one row changes no bit of what the model computes for another."""
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


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize("trained", ["all", "body"])
def test_tokens_count_what_their_rows_say(model_type: str, trained: str) -> None:
    """Loss and gradients are those of each token's own loss times its weight, in every way of computing them."""
    plain = batch(9, 4, 6)
    numbers = [np.linspace(0.25, 2.0, len(row.ids), dtype=np.float32) for row in plain.rows]
    weighed = [replace(row, weights=own) for row, own in zip(plain.rows[:2], numbers, strict=False)]
    rows = Batch([*weighed, plain.rows[2]], plain.references, plain.lines)
    attention = {"llama": ROW_ATTENTION, "gemma2": "eager"}.get(model_type, "sdpa")
    model = tiny_model(model_type, attention).eval()
    model.get_output_embeddings().requires_grad_(trained == "all")
    loss = TargetLoss(model, CPU, torch.float32)(rows)
    loss.backward()
    actual = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    expected = torch.zeros(())
    for row in rows.rows:
        ids = torch.from_numpy(row.ids)
        each = functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        counts = torch.ones(len(ids)) if row.weights is None else torch.from_numpy(row.weights)
        expected = expected + (each * counts[1:])[torch.from_numpy(row.targets[1:])].sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
    counted = sum(
        float(1.0 if row.weights is None else row.weights[place])
        for row in rows.rows
        for place in np.flatnonzero(row.targets)
    )
    assert counted == pytest.approx(rows.weight)
    assert plain.target_tokens == plain.weight


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


@pytest.mark.parametrize("keeps_logits", [True, False])
@pytest.mark.parametrize("has_head", [True, False])
def test_padded_rows_wait_for_no_device(has_head: bool, keeps_logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for the number of their targets: forward and backward run where tensors have sizes and no values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none for such tensors
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    meta, model = torch.device("meta"), tiny_model("llama", "eager")  # the mask of "sdpa" depends on its values
    loss_of: Any = TargetLoss(model, CPU, torch.float32)
    model.to(meta)
    loss_of.device, loss_of._keeps_logits = meta, keeps_logits
    loss_of.forget = lambda: None
    if not has_head:
        loss_of._head = None
    loss_of(batch(9, 2, 17, 6)).backward()
    assert all(weight.grad is not None for weight in model.parameters())
