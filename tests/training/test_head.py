"""Logits of targets only, in chunks, for whatever a model does to its logits; else whole logits in bounded parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rows import CPU, VOCABULARY, batch, loss_and_gradients, tiny_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma3Config

from onward.data.plan.loader import Batch
from onward.training.device.environment import autocast
from onward.training.layers import cross_entropy
from onward.training.layers.attention import ROW_ATTENTION
from onward.training.layers.head import Head, Tail, find_head
from onward.training.steps.loss import TargetLoss

TAILS: dict[str, tuple[dict[str, Any], Tail]] = {
    "llama": ({}, Tail()),
    "cohere": ({"logit_scale": 0.3}, Tail("times", 0.3)),
    "granite": ({"logits_scaling": 7.0}, Tail("over", 7.0)),
    "hyperclovax": ({"logits_scaling": 7.0}, Tail("times", 7.0)),
    "gemma2": ({"final_logit_softcapping": 11.0}, Tail("cap", 11.0)),
    "recurrent_gemma": ({"logits_soft_cap": 13.0, "lru_width": 32}, Tail("cap", 13.0)),
    "phi": ({}, Tail()),
    "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 2}, Tail()),
}  # fmt: skip
"""Models with each kind of tail (no constant is their default), with a bias of the head, with a table of positions."""


def plain(model: nn.Module, rows: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of whole logits, row by row."""
    losses: list[torch.Tensor] = []
    for row in rows.rows:
        ids = torch.from_numpy(row.ids)
        wanted = torch.from_numpy(row.targets)[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(functional.cross_entropy(logits[wanted].float(), ids[1:][wanted], reduction="sum"))
    total = torch.stack(losses).sum()
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(total.detach()), gradients


def assert_same(model: nn.Module, rows: Batch) -> None:
    """Loss and gradients are those of whole logits, row by row."""
    expected, gradients = plain(model, rows)
    loss, found = loss_and_gradients(model, rows)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: n + text)


def largest_head_input(model: nn.Module, rows: Batch) -> int:
    """Return for how many places of a batch the head computes logits at once, at most."""
    sizes: list[int] = []
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[:-1].numel()))
    loss_and_gradients(model, rows)
    handle.remove()
    return max(sizes)


@pytest.mark.parametrize("family", TAILS)
def test_the_tail_is_found_on_the_model(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """What a model does to its logits is found to the last bit, and the loss is that of its own whole logits."""
    settings, tail = TAILS[family]
    model = tiny_model(family, "eager", **settings).eval()
    head = find_head(model, CPU)
    assert head is not None
    assert tail == head.tail
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 4 * VOCABULARY * 5)
    assert_same(model, batch(9, 2, 17, 6))
    assert largest_head_input(model, batch(9, 2, 17, 6)) <= 5


@pytest.mark.parametrize("family", ["gemma2", "phi", "granite"])
def test_heads_that_are_frozen_or_adapted(family: str) -> None:
    """A frozen head, and one with an adapter of its own, give the loss and the gradients of whole logits."""
    for targets in (["q_proj"], ["q_proj", "lm_head"]):
        settings = TAILS[family][0]
        torch.manual_seed(1)
        adapter = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        base: Any = tiny_model(family, "eager", **settings)
        assert_same(get_peft_model(base, adapter).eval(), batch(9, 2, 17, 6))


@pytest.mark.parametrize("family", ["granite", "cohere", "phi"])
def test_rows_end_to_end_with_a_tail(family: str) -> None:
    """A model that is on no list and attends to rows laid end to end has the loss of rows by themselves."""
    model = tiny_model(family, ROW_ATTENTION, **TAILS[family][0]).eval()
    assert not TargetLoss(model, CPU, torch.float32).layout.padded
    assert_same(model, batch(9, 2, 17, 6))


def test_text_inside_a_model_of_pictures() -> None:
    """The text model of a wrapper has its head apart too."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 9.0,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = find_head(model, CPU)
    assert head is not None
    assert model.get_output_embeddings() is head.module
    assert_same(model, batch(9, 2, 17, 6))


def test_what_cannot_be_explained_computes_its_own_logits() -> None:
    """A model that does more to its logits than a known form keeps them; the loss is that of them all the same."""

    def shift(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output.logits = output.logits + torch.linspace(0, 1, VOCABULARY)
        return output

    model = tiny_model("mixtral", "eager").eval()
    assert isinstance(find_head(model, CPU), Head)
    model.register_forward_hook(shift)
    assert find_head(model, CPU) is None
    assert_same(model, batch(9, 2, 17, 6))


def test_looking_for_the_tail_draws_nothing() -> None:
    """Random generators are where they were, whatever dropout the model has."""
    model = tiny_model("gpt2", "eager", **TAILS["gpt2"][0]).train()
    before = torch.get_rng_state()
    assert find_head(model, CPU) is not None
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_tails_in_bfloat16(family: str) -> None:
    """The tail is found in the compute type too, where the head's logits are bfloat16."""
    settings, tail = TAILS[family]
    with autocast(CPU, torch.bfloat16):
        head = find_head(tiny_model(family, "eager", **settings).eval(), CPU)
    assert head is not None
    assert tail == head.tail
