"""What a base model can take is read from its files, and the model behaves accordingly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from onward.config import Config
from onward.errors import ConfigError, ModelError, Unreadable
from onward.training.model.capacity import Capacity, read_capacity, require_embedded, require_fits, require_positions

ROWS, LEARNED = 37, 12
SHAPE: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": LEARNED,
}  # fmt: skip
BERT: dict[str, Any] = {**SHAPE, "intermediate_size": 32, "is_decoder": True, "pad_token_id": 1}
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int | None]] = {
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, n_positions=LEARNED)),
        LEARNED,
    ),
    "gpt_neo": (
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(**{k: v for k, v in SHAPE.items() if "num" not in k}, num_layers=1, num_heads=2,
                         attention_types=[[["global"], 1]])
        ),
        LEARNED,
    ),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=8)), LEARNED),
    "biogpt": (lambda: BioGptForCausalLM(BioGptConfig(**SHAPE, intermediate_size=32)), LEARNED),
    "roberta": (lambda: RobertaForCausalLM(RobertaConfig(**BERT)), LEARNED - 2),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=32)), None),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=32)), None),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(vocab_size=ROWS, hidden_size=16, n_layer=1, n_head=2)), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shard", ["5GB", "4KB"], ids=["one file", "shards"])
def test_limits_are_those_at_which_the_model_fails(kind: str, shard: str, tmp_path: Path) -> None:
    """The largest id and the longest row that fit are computed; one more is an index error, where there is a limit."""
    make, learned = MODELS[kind]
    model: Any = make().eval()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    capacity = read_capacity(tmp_path)
    assert (ROWS, learned) == (capacity.embedding_rows, capacity.learned_positions)
    length = 4 * LEARNED if learned is None else learned
    model(input_ids=torch.full((1, length), ROWS - 1))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 2), ROWS))
    if learned is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, learned + 1), ROWS - 1))


def test_what_does_not_fit_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Ids and lengths at the limit pass; one more names the key, both values and what to do. Unknown limits pass."""
    capacity = Capacity(tmp_path, ROWS, LEARNED)
    require_fits(capacity, largest_token_id=ROWS - 1, max_length=LEARNED)
    require_fits(capacity)
    require_fits(Capacity(tmp_path), largest_token_id=10**6, max_length=10**6)
    with pytest.raises(ModelError, match=rf"token id {ROWS}, .* has {ROWS} rows[\s\S]*resize_token_embeddings"):
        require_fits(capacity, largest_token_id=ROWS)
    with pytest.raises(ConfigError, match=rf"{LEARNED + 1}, .* {LEARNED} positions[\s\S]*--set max_length"):
        require_fits(capacity, max_length=LEARNED + 1)
    texts = {"rows": 2, "tokens": LEARNED + 1, "weight": 0.1}
    for anchor in ({**texts, "tokens": LEARNED}, {**texts, "weight": 0}, {**texts, "rows": 0}):
        require_positions(capacity, Config.model_validate({"max_length": LEARNED, "anchor": anchor}))
    with pytest.raises(ConfigError, match=rf"{LEARNED + 1}, .* {LEARNED} positions[\s\S]*--set anchor.tokens"):
        require_positions(capacity, Config.model_validate({"max_length": LEARNED, "anchor": texts}))


def test_the_token_that_pads_is_one_that_the_model_has(tmp_path: Path) -> None:
    """A config that names a token for padding beyond the embedding is refused with one that is there."""
    state = tiny.byte_state()
    for padding, is_refused in ((500, True), (499, False), (-1, False), (None, False)):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 500, "pad_token_id": padding}))
        capacity = read_capacity(tmp_path)
        if not is_refused:
            require_embedded(capacity, state)
            continue
        with pytest.raises(ModelError, match="token id 500 for padding") as refusal:
            require_embedded(capacity, state)
        assert f": {state.eos_id}" in str(refusal.value.hint)


def header(tensors: dict[str, list[int]]) -> bytes:
    """Return a safetensors file's header for tensors of these shapes."""
    values = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **values}).encode()
    return len(text).to_bytes(8, "little") + text


def test_tables_of_other_inputs_are_not_those_of_text(tmp_path: Path) -> None:
    """The patches of an image have positions of their own, which say nothing about rows of text."""
    tensors = {
        "model.language_model.embed_tokens.weight": [ROWS, 8],
        "model.vision_tower.embeddings.position_embedding.weight": [LEARNED, 8],
        "model.audio_tower.embed_positions.weight": [LEARNED, 8],
        "model.encoder.embed_positions.weight": [LEARNED, 8],
    }
    (tmp_path / "model.safetensors").write_bytes(header(tensors))
    assert Capacity(tmp_path, ROWS, None) == read_capacity(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x05" + bytes(7) + b"{", bytes(8)], ids=range(5)
)
def test_files_that_say_nothing_refuse_nothing(content: bytes, tmp_path: Path) -> None:
    """Without sound headers the config's vocabulary counts; without that nothing is known."""
    (tmp_path / "model.safetensors").write_bytes(content)
    assert Capacity(tmp_path) == read_capacity(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": ROWS}}))
    assert Capacity(tmp_path, ROWS) == read_capacity(tmp_path)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Limits that could not be read are not taken for absent ones."""
    (tmp_path / "config.json").mkdir()
    with pytest.raises(Unreadable, match="cannot be read"):
        read_capacity(tmp_path)
