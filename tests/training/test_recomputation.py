"""Layers computed again in the backward pass (gradient checkpointing), and row lengths that get lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rows import CPU, VOCABULARY, WINDOWED, batch, loss_and_gradients, tiny_model
from torch import nn

from onward.errors import ModelError
from onward.training.layers.attention import PADDING_FREE, ROW_ATTENTION
from onward.training.layers.fused_lora import fuse_lora
from onward.training.layers.recompute import Recomputation
from onward.training.model.load import causal_lm
from onward.training.steps.loss import TargetLoss

ROWS = (9, 2, 17, 6)


def row_model(model_type: str, method: str = "full", dropout: float = 0.0) -> nn.Module:
    """Return a tiny model that takes rows laid end to end; equal for equal arguments."""
    model = tiny_model(model_type, ROW_ATTENTION, **({"sliding_window": 5} if model_type in WINDOWED else {}))
    if method == "full":
        return model
    torch.manual_seed(1)
    adapter = LoraConfig(r=2, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, adapter).train()  # type: ignore[arg-type]
    fuse_lora(adapted)
    return adapted


def seeded_loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of the same rows with the same dropout."""
    torch.manual_seed(2)
    return loss_and_gradients(model, batch(*ROWS))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("method", "dropout"), [("full", 0.0), ("lora", 0.0), ("lora", 0.25)])
@pytest.mark.parametrize("model_type", sorted(PADDING_FREE))
def test_recomputed_layers_give_the_same_bits(model_type: str, method: str, dropout: float) -> None:
    """With recomputation the loss and every gradient are those without it, for each model type on the list."""
    model = row_model(model_type, method, dropout)
    plain, expected = seeded_loss_and_gradients(model)
    calls: list[nn.Module] = []
    attention: Any = causal_lm(model).get_submodule("model.layers.0.self_attn")
    attention.register_forward_pre_hook(lambda module, _args: calls.append(module))
    with Recomputation(model).on():
        again, gradients = seeded_loss_and_gradients(model)
    assert 2 == len(calls)  # it was computed again
    assert plain == again
    assert set(expected) == set(gradients)
    assert [] == [name for name, gradient in gradients.items() if not torch.equal(expected[name], gradient)]


@pytest.mark.parametrize("model_type", sorted(PADDING_FREE))
def test_lengths_that_get_lost_are_refused(model_type: str) -> None:
    """A model that does not hand the lengths of its rows down to its attention is refused, not trained across rows."""

    def without_lengths(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {name: value for name, value in kwargs.items() if name != "row_lengths"}

    model = row_model(model_type)
    for layer in model.base_model.layers:  # type: ignore[union-attr]
        layer.register_forward_pre_hook(without_lengths, with_kwargs=True)
    with pytest.raises(ModelError, match="does not pass the lengths of its rows"):
        TargetLoss(model, CPU, torch.float32)(batch(*ROWS))


@pytest.mark.parametrize("model_type", sorted(PADDING_FREE))
def test_without_rows_attention_is_that_of_transformers(model_type: str) -> None:
    """A plain forward pass, one with padding and generation give the bits of transformers' own `sdpa`."""
    outcomes: list[list[torch.Tensor]] = []
    torch.manual_seed(3)
    ids, mask = torch.randint(3, VOCABULARY, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    for attention in ("sdpa", ROW_ATTENTION):
        settings = {"sliding_window": 5} if model_type in WINDOWED else {}
        model: Any = tiny_model(model_type, attention, **settings).eval()
        with torch.no_grad():
            plain, padded = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits
            generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        outcomes.append([plain, padded, generated])
    assert [True] * 3 == [torch.equal(*pair) for pair in zip(*outcomes, strict=True)]
