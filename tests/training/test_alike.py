"""Which weights a gradient reaches, told by the first layers for all that are like them, or by the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import small
import torch
from peft import LoraConfig, get_peft_model
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel

from onward.training.admission.gradients import logits_of, row_by_row
from onward.training.admission.inputs import rows
from onward.training.admission.small.alike import reached_by_kinds
from onward.training.admission.small.shorten import layers_to_shorten

CPU = torch.device("cpu")
VOCABULARY = range(small.VOCABULARY)


def gradients_of(model: Any) -> set[str]:
    """Return the names of the weights that a gradient of a short row reaches."""
    return set(row_by_row(model, rows([6], VOCABULARY), CPU, torch.float32).of)


def by_kinds(model: Any, reached: Callable[[], set[str]] | None = None) -> set[str] | None:
    """Return what the first layers tell of all of them."""
    few = rows([6], VOCABULARY)
    reached = reached or partial(gradients_of, model)
    return reached_by_kinds(model, layers_to_shorten(model), reached, lambda: logits_of(model, few, CPU, torch.float32))


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_equal_layers_are_reached_as_the_first_ones_are(targets: list[str] | None) -> None:
    """The first layers tell for the rest, by name; nothing of the model is another afterwards."""
    model: Any = small.small_model("llama", num_hidden_layers=5)
    if targets:
        model = get_peft_model(model, LoraConfig(target_modules=targets, layers_to_transform=[0, 1, 2, 3]))
        assert by_kinds(model) is None  # the last layer is one of a kind
        model = get_peft_model(model.unload(), LoraConfig(target_modules=targets))
    computed: list[int] = []

    def reached() -> set[str]:
        computed.append(sum(1 for part in model.modules() if type(part) is LlamaDecoderLayer))
        return gradients_of(model)

    assert gradients_of(model) == by_kinds(model, reached)
    assert [2] == computed
    assert [0, 1, 2, 3, 4] == [part.layer_idx for part in model.modules() if hasattr(part, "layer_idx")]


class AsksForItsNumber(LlamaAttention):
    """A part of a layer that does something else in the last one."""

    def forward(self, *given: Any, **more: Any) -> Any:
        """Compute nothing of the input in the last layer."""
        output, weights = super().forward(*given, **more)
        return (output * 0).detach() if self.layer_idx == 4 else output, weights


def test_layers_that_are_told_apart_do_not_speak_for_each_other() -> None:
    """By a number that they ask for, by a loop that counts, by what is trained of them."""
    asking, frozen = (small.small_model("llama", num_hidden_layers=5) for _ in range(2))
    for part in asking.modules():
        if type(part) is LlamaAttention:
            part.__class__ = AsksForItsNumber
    cast(Any, frozen).model.layers[3].mlp.up_proj.weight.requires_grad_(False)
    for model in (
        asking,
        frozen,
        small.small_model("gemma", num_hidden_layers=5),
    ):
        assert by_kinds(model) is None


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "bloom", "falcon"])
def test_a_loop_that_counts_may_call_all_alike(family: str) -> None:
    """Stand-ins tell what the loop makes of its numbers; nothing of the model is another afterwards."""
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    more: dict[str, Any] = {"layer_types": ["full_attention"] * 5} if family == "qwen2" else {}
    model = small.small_model(family, **{key: 5}, **more)
    (layers,) = layers_to_shorten(model)
    before = list(layers.layers)
    computed: list[int] = []

    def reached() -> set[str]:
        computed.append(len(getattr(layers.parent, layers.name)))
        return gradients_of(model)

    assert gradients_of(model) == by_kinds(model, reached)
    assert [2] == computed
    assert before == list(getattr(layers.parent, layers.name))


class Counting(LlamaModel):
    """A model whose loop counts its layers, and does `fault` with the number."""

    fault = "nothing"

    def forward(self, input_ids: Any = None, **_: Any) -> Any:
        """Compute hidden states without a mask."""
        hidden = self.embed_tokens(input_ids)
        places = torch.arange(hidden.shape[1])[None]
        turned = self.rotary_emb(hidden, places)
        kept = hidden
        for number, layer in enumerate(self.layers):
            is_last = number == 4
            if is_last and self.fault == "skips":
                continue
            given = turned if not (is_last and self.fault == "gives") else (turned[0] * 0, turned[1])
            hidden = layer(hidden, position_embeddings=given, position_ids=places)
            if is_last and self.fault == "scales":
                hidden = hidden * 0
            if number == 2:
                kept = hidden
        hidden = {"takes": kept, "adds": hidden + kept}.get(self.fault, hidden)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


@pytest.mark.parametrize("fault", ["nothing", "skips", "gives", "scales", "takes", "adds"])
def test_a_loop_that_tells_layers_apart_is_noticed(fault: str) -> None:
    """By what it gives a layer, what it makes of an output, and which outputs it uses."""
    model: Any = small.small_model("llama", num_hidden_layers=5)
    model.model.__class__ = type("Counting", (Counting,), {"fault": fault})
    expected = gradients_of(model) if fault == "nothing" else None
    assert expected == by_kinds(model)
