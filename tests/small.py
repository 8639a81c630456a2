"""Small random models of any causal family that the installed transformers knows, made from its config alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 320
HIDDEN, HEADS, FEW_HEADS, HEAD = 32, 4, 2, 8
POSITIONS = 512
WINDOW = 16

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embedding_size", "emb_dim"), HIDDEN),
    **dict.fromkeys(("output_hidden_size", "attention_hidden_size", "lru_width", "backbone_hidden_size"), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "rnn_hidden_size", "input_embedding_size", "projection_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "ffn_hidden_size", "d_ff"), 2 * HIDDEN),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "dff", "feed_forward_size"), 2 * HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size_mlp", "expert_hidden_size", "moe_latent_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "linear_key_head_dim", "linear_value_head_dim"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_channels", "index_head_dim"), HEAD),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_topk"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"), POSITIONS),
    **dict.fromkeys(("model_max_length", "max_seq_len", "max_target_positions", "max_source_positions"), POSITIONS),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "keep_window_size"), WINDOW),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("image_size", "patch_size"), 16),
    "query_pre_attn_scalar": HEAD,
    "rotary_dim": HEAD,
    "block_size": 16,
}
"""Small values of the sizes that a config may have, by key."""
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "num_blocks",
)  # fmt: skip
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_types", "layer_type_list")
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": FEW_HEADS, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v4": {"head_dim": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 2 * HEAD},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {"per_layer_config": {"1": {"head_dim": 16}}, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": {"per_layer_config": {"1": {"head_dim": 16}}},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "attention_layers": ["global", "local"],
    },
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"linear_attn_config": {"head_dim": HEAD, "num_heads": HEADS, "short_conv_kernel_size": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": FEW_HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": FEW_HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "ple_embed_dim": HIDDEN,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 4,
        "hc_lowrank": 8,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [16, 32],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
        "feed_forward_size": 64,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlstm": {"num_hidden_layers": 2, "num_blocks": 2, "embedding_dim": HIDDEN},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "n_mamba_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "kv_channels": 8,
        "hybrid_layer_ids": [1, 3],
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beyond that, because its sizes depend on each other in a way of their own."""


def causal_families() -> list[str]:
    """Return the names of all causal families that the installed transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(family: str, **settings: Any) -> PreTrainedConfig:
    """Return the config of a small model of a family: two layers, or one of each kind that it has.

    Args:
        settings: keys of the config that win over the small values.
    """
    kind = CONFIG_MAPPING[family]
    values = _small(cast(type[PreTrainedConfig], kind), {**FAMILIES.get(family, {}), **settings})
    return cast(PreTrainedConfig, kind(**values))


def small_model(family: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a small random model of a family in float32; the caller's random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(small_config(family, **settings), dtype=torch.float32)


def _small(kind: type[PreTrainedConfig], wins: Mapping[str, Any]) -> dict[str, Any]:
    default = kind()
    known = default.to_dict()
    values: dict[str, Any] = {}
    nested = [key for key, value in vars(default).items() if isinstance(value, PreTrainedConfig)]
    kinds = [known[key] for key in LAYER_LISTS if _is_of_words(known.get(key))]
    depth = max([2, *(len(dict.fromkeys(each)) for each in kinds)])
    for key, value in known.items():
        inner = vars(default).get(key)
        if isinstance(inner, PreTrainedConfig):
            values[key] = _small(type(inner), {**FAMILIES.get(inner.model_type, {}), **wins.get(key, {})})
        elif key in KEY_HEADS and isinstance(value, int):
            values[key] = HEADS if value == known.get("num_attention_heads", known.get("n_head")) else FEW_HEADS
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            values[key] = SIZES[key]
        elif key in LAYERS and isinstance(value, int):
            values[key] = depth
        elif key in LAYER_LISTS and _is_of_words(value):
            distinct = list(dict.fromkeys(value))
            values[key] = (distinct * depth)[:depth]
    values |= {
        key: min(value, 3) for key, value in known.items() if key.endswith("_token_id") and isinstance(value, int)
    }
    return {**values, **{key: value for key, value in wins.items() if key not in nested}}


def _is_of_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def beside_weights(model: nn.Module) -> dict[str, Any]:
    """Return copies of the buffers of a model, and of the plain values of the modules that hold them, by name."""
    plain = (bool, int, float, str, type(None), torch.Tensor)
    found: dict[str, Any] = {}
    for place, module in model.named_modules():
        if module._buffers:
            held = {name: value for name, value in vars(module).items() if isinstance(value, plain)}
            named = {**held, **module._buffers, "training": None}
            found |= {f"{place}:{type(module).__name__}.{name}": copy.deepcopy(value) for name, value in named.items()}
    return found


def changed_beside_weights(model: nn.Module, before: dict[str, Any]) -> list[str]:
    """Return which of these values have changed since, by module type and name."""
    after = beside_weights(model)
    same = {name for name in before.keys() & after.keys() if _is_same(before[name], after[name])}
    return sorted(name.rpartition(":")[2] for name in (before.keys() | after.keys()) - same)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return one is None and other is None if one is None or other is None else bool(one == other)
