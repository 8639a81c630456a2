"""Small random models of any causal family that the installed transformers knows, made from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 320
HIDDEN, HEADS, KEY_HEADS, HEAD = 32, 4, 2, 8
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
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), KEY_HEADS),
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
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "num_blocks",
)  # fmt: skip
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_types", "layer_type_list")
FAMILIES: dict[str, dict[str, Any]] = {}
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
    known = {**default.to_dict(), **{key: getattr(default, key) for key in SIZES if hasattr(default, key)}}
    values: dict[str, Any] = {}
    kinds = {tuple(known[key]) for key in LAYER_LISTS if isinstance(known.get(key), list)}
    depth = max([2, *(len(dict.fromkeys(each)) for each in kinds)])
    for key, value in known.items():
        if isinstance(getattr(default, key, None), PreTrainedConfig):
            values[key] = _small(type(getattr(default, key)), wins.get(key, {}))
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            values[key] = SIZES[key]
        elif key in LAYERS and isinstance(value, int):
            values[key] = depth
        elif key in LAYER_LISTS and isinstance(value, list):
            distinct = list(dict.fromkeys(value))
            values[key] = (distinct * depth)[:depth]
    values |= {key: min(value, 3) for key, value in known.items() if key.endswith("_token_id") and isinstance(value, int)}
    return {**values, **wins}
