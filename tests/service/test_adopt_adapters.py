"""Adapters of every kind, and whole models that have grown: taken as they are, or refused by name with a way on."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny
import torch
from safetensors.torch import load_file, save_file
from states import read_state
from stock import HORIZON
from transformers import AutoModelForCausalLM

from onward import Run
from onward.errors import ModelError, UsageError
from onward.training.model.adapter_config import read_adapter

SETTINGS: dict[str, Any] = {"evaluation": {"share": 0}, "max_length": 128}


def assert_taken_and_goes_on(run: Run, adapted: Any, trainer: Any, folder: Path) -> None:
    """A run has weights, moments and logits of the Trainer that it was adopted from, and trains another file."""
    state = stock.open_state(run.layout.root)
    stock.assert_equal(stock.trained(adapted), stock.trained(state.model))
    stock.assert_equal(stock.moments(adapted, trainer.optimizer), stock.moments(state.model, state.optimizer))
    assert torch.equal(stock.logits(adapted), stock.logits(state.model))
    run.train(tiny.write_jsonl(folder / "more.jsonl", tiny.chat_rows(12)))
    assert ({5}, True) == (read_state(run.layout.root)["adam"], run.verify().ok)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of two layers."""
    return tiny.save_tiny_model(tmp_path_factory.mktemp("deep"), layers=2)


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "begun by pissa_niter_16"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "begun by loftq"),
    "CorDA": ({"init_lora_weights": "corda"}, "begun by corda"),
    "of a future release": ({"splendid": {"more": 1}}, "splendid {'more': 1}"),
    "lora_bias": ({"lora_bias": True}, "lora_bias True"),
    "several": ({"layer_replication": [[0, 2]], "use_qalora": True}, "layer_replication [[0, 2]]; use_qalora True"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens [5]"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_cannot_go_on_are_refused_by_name(case: str, checkpoint: Path) -> None:
    """What changes the base, or is not known, is named, and the way on."""
    fields, reason = ADAPTERS[case]
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ModelError) as caught:
        read_adapter(checkpoint)
    assert reason in caught.value.what
    can_merge = "onward init NEW_RUN --model MERGED" in str(caught.value.hint)
    assert can_merge == (case == "of a future release")
    ways = "Merge it into its base: python -c|with --model FOLDER|PEFT cannot merge it into its base .* onward init"
    assert re.search(ways, str(caught.value.hint))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_the_base_does_not_have(bias: str, checkpoint: Path) -> None:
    """PEFT accepts the word but trains none, so there is nothing to continue with; if it saved some, they count."""
    path, weights = checkpoint / "adapter_config.json", checkpoint / "adapter_model.safetensors"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": bias}))
    assert "none" == read_adapter(checkpoint)["bias"]
    save_file({**load_file(weights), "base_model.model.q_proj.base_layer.bias": torch.zeros(4)}, weights)
    assert bias == read_adapter(checkpoint)["bias"]


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_adapters_on_embedding_and_head_are_taken(layer: str, model: Path, tmp_path: Path) -> None:
    """PEFT writes the base's own rows alongside such an adapter; they are recognized, and all goes on as it was.

    Rows that the base does not have are not left out.
    """
    adapted = stock.lora_model(model, target_modules=["q_proj", layer])
    stop: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(2)]}
    trainer = stock.trainer(adapted, tmp_path / "stock", **stop)
    trainer.train()
    folder = tmp_path / "stock/checkpoint-2"
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    carried = [name for name in tensors if ".lora_" not in name]
    assert [] != carried
    run = Run.adopt(folder, tmp_path / "run", str(model), settings=SETTINGS)
    assert_taken_and_goes_on(run, adapted, trainer, tmp_path)
    tensors[carried[-1]][-1] += 1.0
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=f"the adapter contains {carried[-1]}: its own embeddings or head"):
        Run.adopt(folder, tmp_path / "refused", str(model), settings=SETTINGS)


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0},
        {"trainable_token_indices": [3, 5]},
        {"exclude_modules": ["layers.0.self_attn.v_proj"]},
    ],
    ids=lambda lora: "+".join(lora),
)
def test_more_of_peft_is_taken(lora: dict[str, Any], deep: Path, tmp_path: Path) -> None:
    """Each field becomes a config key; weights, moments and logits are the Trainer's, and the run goes on, proven."""
    adapted = stock.lora_model(deep, **lora)
    stop: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(2)]}
    trainer = stock.trainer(adapted, tmp_path / "stock", **stop)
    trainer.train()
    run = Run.adopt(tmp_path / "stock/checkpoint-2", tmp_path / "run", str(deep), settings=SETTINGS)
    state = stock.open_state(tmp_path / "run")
    stock.assert_equal(stock.trained(adapted), stock.trained(state.model))
    stock.assert_equal(stock.moments(adapted, trainer.optimizer), stock.moments(state.model, state.optimizer))
    assert torch.equal(stock.logits(adapted), stock.logits(state.model))
    run.train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(12)))
    assert ({5}, True) == (read_state(run.layout.root)["adam"], run.verify(deep=True).ok)


MERGED: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("case", MERGED)
def test_the_command_that_merges_makes_the_same_model(case: str, model: Path, tmp_path: Path) -> None:
    """What is refused goes on as a whole model, by the command that the refusal names: equal logits, to rounding."""
    tokenizer = tiny.byte_tokenizer()
    adapted = stock.lora_model(model, **MERGED[case])
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    for part in (adapted, tokenizer):
        part.save_pretrained(tmp_path / "an adapter")
    with pytest.raises(ModelError) as caught:
        Run.adopt(tmp_path / "an adapter", tmp_path / "run", str(model), fresh_moments=True)
    words = shlex.split(str(caught.value.hint).partition("base: ")[2].partition("; then: ")[0])
    assert ["python", "-c"] == words[:2]
    with contextlib.chdir(tmp_path):
        exec(compile(words[2], "hint", "exec"))  # the program that a person would run, without a new interpreter
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "MERGED")
    expected, actual = stock.logits(adapted), stock.logits(merged)
    assert torch.allclose(expected, actual, rtol=0.0, atol=1e-4)
    untrained = stock.logits(AutoModelForCausalLM.from_pretrained(model))
    assert not torch.allclose(untrained, actual[..., : untrained.shape[-1]], rtol=0.0, atol=1e-2)
    Run.create(tmp_path / "run", str(tmp_path / "MERGED"))


GROWN: dict[str, dict[str, Any]] = {
    "no more than an adapter": {},
    "an adapter on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "the embedding is trained whole": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("case", GROWN)
def test_an_adapter_with_a_grown_vocabulary_goes_on_by_the_command_that_is_named(
    case: str, model: Path, tmp_path: Path
) -> None:
    """The base with the rows that the adapter's file carries: weights, moments and logits are then the Trainer's.

    The embedding has more rows than the tokenizer, as where it was filled up to a multiple of 64.
    """
    base = AutoModelForCausalLM.from_pretrained(model)
    base.resize_token_embeddings(300)
    adapted = stock.lora_model(model, base=base, **GROWN[case])
    settings: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(2)]}
    trainer = stock.trainer(adapted, tmp_path / "stock", processing_class=tiny.byte_tokenizer(), **settings)
    trainer.train()
    with pytest.raises(ModelError, match="as after its vocabulary was extended") as caught:
        Run.adopt(tmp_path / "stock/checkpoint-2", tmp_path / "run", str(model))
    program, _, command = str(caught.value.hint).partition("base: ")[2].partition("; then: onward adopt ")
    with contextlib.chdir(tmp_path):
        exec(compile(shlex.split(program)[2], "hint", "exec"), {})  # without a new interpreter
    folder, _, _, _, grown = shlex.split(command)
    run = Run.adopt(Path(folder), tmp_path / "run", str(tmp_path / grown), settings=SETTINGS)
    assert_taken_and_goes_on(run, adapted, trainer, tmp_path)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_how_an_adapter_began_does_not_matter_where_the_base_stayed(init: Any, checkpoint: Path) -> None:
    """First weights that are the adapter's own are gone once it is trained."""
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    assert 4 == read_adapter(checkpoint)["r"]


def test_a_whole_model_whose_vocabulary_has_grown_is_its_own_base(model: Path, tmp_path: Path) -> None:
    """Also where `--model` names what it was made from: tokens that only it has are trained. It needs its tokenizer."""
    tokenizer = tiny.byte_tokenizer(extra=["<|new|>"])
    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.resize_token_embeddings(len(tokenizer))
    stop: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(1)]}
    stock.trainer(whole, tmp_path / "stock", **stop).train()
    folder = tmp_path / "stock/checkpoint-1"
    with pytest.raises(UsageError, match=f"has {len(tokenizer)} rows in its embedding.* and no tokenizer") as caught:
        Run.adopt(folder, tmp_path / "run", str(model))
    words = shlex.split(str(caught.value.hint).partition("into it: ")[2].partition("; then")[0])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    exec(compile(words[2].replace("'TOKENIZER'", repr(str(tmp_path / "tokenizer"))), "hint", "exec"))
    run = Run.adopt(folder, tmp_path / "run", str(model), settings=SETTINGS)
    assert "base" == run.config.model
    row = {"messages": [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "<|new|>"}]}
    run.train(tiny.write_jsonl(tmp_path / "new.jsonl", [row] * 4))
    assert (2, True) == (run.status()["global_step"], run.verify().ok)
