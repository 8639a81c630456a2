"""What a proof leaves out of a large model, and what it does not: whatever could show something else stays whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from onward.config import Config
from onward.errors import ModelError
from onward.training.admission.admit import admit
from onward.training.admission.causality import as_float32
from onward.training.admission.small.vocabulary import ROWS, shorten_vocabulary
from onward.training.admission.small.width import COLUMNS, narrow_width
from onward.training.model.spec import ModelSpec

CPU = torch.device("cpu")
IDS = 2000
INNER = 4 * COLUMNS


def made(family: str = "llama", **settings: Any) -> Any:
    """Return a small model with a vocabulary and perceptrons that can be cut."""
    return small.small_model(family, **{"vocab_size": IDS, "intermediate_size": INNER, **settings})


def ids_left(model: nn.Module, dtype: torch.dtype = torch.float32) -> range:
    """Return the ids that are left of a model's vocabulary."""
    return shorten_vocabulary(model, range(IDS), CPU, dtype)


def computed(model: Any, ids: range) -> torch.Tensor:
    """Return the logits of some ids, for those ids."""
    row = torch.arange(ids.start, ids.stop, 50)[None]
    with torch.no_grad():
        return model.eval()(input_ids=row, use_cache=False).logits[..., ids.start : ids.stop]


@pytest.mark.parametrize(
    ("family", "settings", "first"),
    [
        ("llama", {"tie_word_embeddings": False}, 3),
        ("qwen2", {"tie_word_embeddings": True}, 0),
        ("llama", {"bos_token_id": 1, "eos_token_id": 1999, "pad_token_id": 1998}, 2),
        ("llama", {"bos_token_id": 1, "eos_token_id": [7, 300], "pad_token_id": None}, 301),
        ("gemma3_text", {}, 3),
        ("gemma2", {}, 3),
        ("granite", {"logits_scaling": 8.0}, 3),
        ("gpt2", {}, 4),
        ("opt", {}, 3),
    ],
)
def test_the_first_ids_without_a_meaning_are_left(family: str, settings: dict[str, Any], first: int) -> None:
    """They are views of the weights that were there, tied ones stay tied, and their logits are the same."""
    model = made(family, **settings)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    special = {int(each) for each in (model.config.bos_token_id, model.config.pad_token_id) if each is not None}
    before, places = computed(model, range(first, first + ROWS)), [each.weight.data_ptr() for each in (embedding, head)]
    left = ids_left(model)
    assert range(first, first + ROWS) == left
    assert not special & set(left)
    assert places == [each.weight.data_ptr() for each in (embedding, head)]
    assert {left.stop} == {len(embedding.weight), len(head.weight), embedding.num_embeddings, head.out_features}
    assert model.config.tie_word_embeddings == (embedding.weight is head.weight)
    torch.testing.assert_close(before, computed(model, left), rtol=0, atol=1e-6)


def with_adapter(**settings: Any) -> Any:
    """Return a model with an adapter."""
    return get_peft_model(made(tie_word_embeddings=False), LoraConfig(**{"target_modules": ["q_proj"], **settings}))


class EndsOfLogits(LlamaForCausalLM):
    """A model whose logits depend on that of the last id."""

    def forward(self, *given: Any, **more: Any) -> Any:
        """Return logits as the model does."""
        outputs = super().forward(*given, **more)
        outputs.logits = outputs.logits + outputs.logits[..., -1:]
        return outputs


class LooksAheadForLateIds(LlamaForCausalLM):
    """A model that looks ahead in the logits of late ids only."""

    def forward(self, *given: Any, **more: Any) -> Any:
        """Return logits as the model does."""
        outputs = super().forward(*given, **more)
        late = outputs.logits[..., IDS // 2 :]
        outputs.logits = torch.cat([outputs.logits[..., : IDS // 2], late + late.mean(dim=1, keepdim=True)], dim=-1)
        return outputs


class TellsLateIds(LlamaForCausalLM):
    """A model that does with late ids something besides looking them up."""

    def forward(self, input_ids: Any = None, **more: Any) -> Any:
        """Return logits as the model does."""
        outputs = super().forward(input_ids=input_ids, **more)
        if input_ids is not None and bool((input_ids > IDS // 2).any()):
            outputs.logits = outputs.logits * 2
        return outputs


class MixingEmbedding(nn.Embedding):
    """An embedding in which each vector has a trace of the next."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the vectors of ids."""
        vectors = super().forward(ids)
        return vectors + 1e-3 * vectors.roll(-1, dims=1)


def as_class(kind: type) -> Any:
    """Return a model of another class."""
    model = made()
    model.__class__ = kind
    return model


def changed(change: Callable[[Any], object]) -> Any:
    """Return a model with a change."""
    model = made()
    change(model)
    return model


WHOLE: dict[str, Callable[[], Any]] = {
    "an adapter on the embedding": lambda: with_adapter(target_modules=["q_proj", "embed_tokens"]),
    "an adapter on the head": lambda: with_adapter(target_modules=["q_proj", "lm_head"]),
    "a head that is trained whole": lambda: with_adapter(modules_to_save=["lm_head"]),
    "trained tokens": lambda: with_adapter(trainable_token_indices=[1, 1999]),
    "a hook on the embedding": lambda: changed(
        lambda model: model.model.embed_tokens.register_forward_hook(lambda _part, _given, out: out.roll(-1, 1))
    ),
    "a forward pass of the head's own": lambda: changed(lambda model: vars(model.lm_head).update(forward=len)),
    "an embedding that mixes": lambda: changed(
        lambda model: model.set_input_embeddings(MixingEmbedding(IDS, small.HIDDEN))
    ),
    "another table of ids": lambda: changed(
        lambda model: setattr(model.model, "more", nn.Embedding(IDS, 3)),
    ),
    "logits that depend on the last one": lambda: as_class(EndsOfLogits),
    "logits that look ahead for late ids": lambda: as_class(LooksAheadForLateIds),
    "late ids that are told apart": lambda: as_class(TellsLateIds),
    "an embedding with more rows than the head": lambda: changed(
        lambda model: model.set_input_embeddings(nn.Embedding(IDS + 1, small.HIDDEN))
    ),
    "special ids all over": lambda: made(eos_token_id=list(range(0, IDS, 400))),
}


@pytest.mark.parametrize("what", WHOLE)
def test_a_vocabulary_that_could_show_more_stays_whole(what: str) -> None:
    """Models that train single ids, have hooks on the tables, or treat ids or logits differently."""
    model = WHOLE[what]()
    assert range(IDS) == ids_left(model)
    assert len(model.get_input_embeddings().weight) >= len(model.get_output_embeddings().weight) == IDS


def prove(folder: Path, model: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Return what the admission of a model finds."""
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    config = Config.model_validate({"model": str(folder), "max_length": 64, **settings})
    return admit(ModelSpec(config, folder, CPU, dtype))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_findings_are_those_of_the_whole_model(method: str, tied: bool, tmp_path: Path) -> None:
    """What is trained and reached is counted before anything is left out; gradients are equal to rounding."""
    model = made(tie_word_embeddings=tied, pad_token_id=IDS - 1)
    found = prove(tmp_path, model, method=method)
    assert ("end to end", "", (), (), ()) == (
        found.rows,
        found.why_padded,
        found.left_out,
        found.unreached,
        found.writers,
    )
    assert 0 < found.difference < 1e-5
    if method == "full":
        assert sum(weight.numel() for weight in model.parameters()) == found.trained


def test_a_number_in_a_late_row_or_column_is_seen(tmp_path: Path) -> None:
    """A head or a perceptron that is not finite is refused, wherever that is."""
    for place, part in enumerate(("lm_head", "model.layers.0.mlp.up_proj")):
        model = made(tie_word_embeddings=False)
        with torch.no_grad():
            model.get_submodule(part).weight[-1, 0] = float("nan")
        with pytest.raises(ModelError, match="logits are not finite"):
            prove(tmp_path / str(place), model)


def narrowed(model: Any, works: Callable[[], object] = lambda: None) -> int:
    """Return how many perceptrons are narrower now."""
    return narrow_width(model, CPU, torch.float32, works)


@pytest.mark.parametrize("bias", [True, False])
def test_perceptrons_have_their_first_columns_left(bias: bool) -> None:
    """With their adapters; the model computes as one that was made so narrow."""
    model = get_peft_model(made(mlp_bias=bias), LoraConfig(target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    mlp: Any = model.get_base_model().get_submodule("model.layers.0.mlp")
    states = torch.randn(1, 3, small.HIDDEN)
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    with torch.no_grad():
        inner = mlp.act_fn(layers[0](states)) * layers[1](states)
        last = layers[2].base_layer
        expected = nn.functional.linear(inner[..., :COLUMNS], last.weight[:, :COLUMNS], last.bias)
        lower = nn.functional.linear(inner[..., :COLUMNS], layers[2].lora_A.default.weight[:, :COLUMNS])
        expected = expected + layers[2].scaling["default"] * layers[2].lora_B.default(lower)
        assert 2 == narrowed(model)
        torch.testing.assert_close(expected, mlp(states), rtol=1e-5, atol=1e-6)
    assert {COLUMNS} == {len(layer.base_layer.weight) for layer in layers[:2]}
    assert [small.HIDDEN, COLUMNS] == list(last.weight.shape)


class Rolls(nn.Module):
    """An activation that moves columns."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states, each from its neighbour."""
        return nn.functional.silu(states).roll(1, dims=-1)


class AddsItsInput(nn.Module):
    """A perceptron that adds what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(small.HIDDEN, INNER)
        self.down = nn.Linear(INNER, small.HIDDEN)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return states."""
        return states + self.down(self.up(states))


WIDE: dict[str, Callable[[Any], object]] = {
    "columns that move": lambda mlp: setattr(mlp, "act_fn", Rolls()),
    "a hook": lambda mlp: mlp.down_proj.register_forward_hook(lambda _part, _given, out: out),
    "a weight that two share": lambda mlp: setattr(mlp.up_proj, "weight", mlp.gate_proj.weight),
    "one more weight": lambda mlp: mlp.register_parameter("scale", nn.Parameter(torch.ones(1))),
}


@pytest.mark.parametrize("what", WIDE)
def test_a_perceptron_that_could_show_more_stays_whole(what: str) -> None:
    """Each is looked at by itself: the one of the other layer is narrower."""
    model = made()
    WIDE[what](model.model.layers[0].mlp)
    assert 1 == narrowed(model)
    assert INNER == len(model.model.layers[0].mlp.gate_proj.weight)


def test_a_model_that_fails_when_it_is_narrower_gets_its_columns_back() -> None:
    """Nothing of it is another than before."""
    model = made()
    model.model.layers[0].mlp = AddsItsInput()
    before = {name: (weight.data_ptr(), weight.shape) for name, weight in model.named_parameters()}

    def fails() -> None:
        raise RuntimeError

    assert 0 == narrowed(model, fails)
    assert before == {name: (weight.data_ptr(), weight.shape) for name, weight in model.named_parameters()}


def test_weights_come_back_from_float32_as_they_were() -> None:
    """They are the same memory, but for those that were written to, which keep what was written. Layers with weights
    in 4 bits no longer round what these are multiplied by: that would make differences of experts large.
    """
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).to(torch.bfloat16)
    model[2].compute_dtype = torch.bfloat16
    places, counted, uncounted = [weight.data_ptr() for weight in model.parameters()], model[0].weight, model[1].weight
    expected = [counted.detach() / 2, uncounted.detach() * 4]
    with as_float32(model), torch.no_grad():
        assert {torch.float32} == {model[2].compute_dtype, *(weight.dtype for weight in model.parameters())}
        counted.div_(2)
        uncounted.data.mul_(4)
    assert all(torch.equal(*pair) for pair in zip(expected, (counted, uncounted), strict=True))
    same = [weight.data_ptr() == place for weight, place in zip(model.parameters(), places, strict=True)]
    assert [False, True, False, True, True, True] == same
    assert {torch.bfloat16} == {model[2].compute_dtype, *(weight.dtype for weight in model.parameters())}
