"""Models in the shapes of public ones, with random weights, and rows of random tokens: nothing is downloaded."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).parents[2] / "tests"
sys.path.append(str(TESTS))  # its tokenizer of bytes, its faults and its processes

LENGTH, ROWS = 2048, 8
"""Tokens of a packed row, and rows of a step."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Args:
        kind: model type of transformers.
        values: keys of its config.
        steps: steps that are timed.
    """

    kind: str
    values: dict[str, Any]
    steps: int = 6


def _shape(kind: str, hidden: int, inner: int, layers: int, heads: tuple[int, int], vocabulary: int) -> Shape:
    own = {"head_dim": 128} if kind == "qwen3" else {}
    values = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "vocab_size": vocabulary, "tie_word_embeddings": kind == "qwen3",
        "max_position_embeddings": 8192, **own,
    }  # fmt: skip
    return Shape(kind, values)


SHAPES = {
    "Qwen3-0.6B": _shape("qwen3", 1024, 3072, 28, (16, 8), 151936),
    "Qwen3-1.7B": _shape("qwen3", 2048, 6144, 28, (16, 8), 151936),
    "Llama-3.1-8B": _shape("llama", 4096, 14336, 32, (32, 8), 128256),
    "small": _shape("llama", 512, 1536, 6, (8, 4), 4096),
    "tiny": Shape("qwen3", {**_shape("qwen3", 64, 128, 3, (4, 2), 320).values, "head_dim": 16}, steps=3),
}


def config_of(name: str) -> Any:
    """Return the transformers config of a shape."""
    from transformers import AutoConfig

    shape = SHAPES[name]
    return AutoConfig.for_model(shape.kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape.values)


def model_modules(name: str) -> list[str]:
    """Return the modules that a model of a shape needs, and an adapter for it."""
    kind = SHAPES[name].kind
    adapter = ["peft", "peft.utils.transformers_weight_conversion"]  # the second is what an adapter imports when made
    return [f"transformers.models.{kind}.modeling_{kind}", "transformers.models.auto.modeling_auto", *adapter]


def device() -> torch.device:
    """Return the GPU, or the CPU if there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def dtype_of(where: torch.device) -> torch.dtype:
    """Return the compute type that a run picks there."""
    from onward.training.device.environment import pick_dtype

    return pick_dtype("auto", where)


def base_model(name: str, dtype: torch.dtype) -> Any:
    """Return a random model on the device, in training mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device():
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype)
    model.config.use_cache = False
    return model.train()


def saved_model(name: str, folder: Path) -> Path:
    """Write a random model with a byte tokenizer, as a base folder for a run."""
    import tiny

    tokenizer = tiny.byte_tokenizer()
    config = config_of(name)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def token_rows(count: int, lengths: tuple[int, int], vocabulary: int, seed: int = 0) -> list[Any]:
    """Return rows of random tokens, all of them targets; lengths are between two, most of them short.

    A row of random tokens costs as much as a row of text: nothing in a step depends on what tokens mean.
    """
    from onward.data.tokenized import Row

    source = np.random.default_rng(seed)
    least, most = lengths
    sizes = (least + (most - least) * source.beta(1.0, 3.0, count)).astype(int)
    return [Row(source.integers(3, vocabulary, size), np.arange(size) > 0) for size in sizes]


def text_file(path: Path, rows: int, lengths: tuple[int, int], seed: int = 0) -> Path:
    """Write rows of letters; the tokenizer of bytes makes a token of each."""
    source = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    lines = (json.dumps({"text": "".join(source.choices(letters, k=source.randint(*lengths)))}) for _ in range(rows))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
