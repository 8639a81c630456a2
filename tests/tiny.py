"""Tiny tokenizers, models and rows that tests share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onward.data.tokenizer import TokenizerState

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
LLAMA = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "extra": ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"],
}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "extra": ["<start_of_turn>", "<end_of_turn>"]}
PHI = {"eos_token": "<|endoftext|>", "extra": ["<|end|>", "<|user|>", "<|assistant|>"]}
COHERE = {
    "bos_token": "<BOS_TOKEN>",
    "eos_token": "<|END_OF_TURN_TOKEN|>",
    "extra": ["<|START_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
}
MISTRAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "default_system": {},
    "qwen2_5": {"extra": ["<|endoftext|>"]},
    "qwen3": {},
    "qwen3_training": {},
    "llama3_2": LLAMA,
    "gemma": GEMMA,
    "phi3": PHI,
    "cohere2": COHERE,
    "brackets": MISTRAL,
    "plain_headers": MISTRAL,
}
"""Templates of `trait_templates` that are tested together, each with the special tokens that go with it."""
SUBJECTS = ("the river", "a quiet house", "my old bicycle", "the last train", "a green lamp", "this small town")
VERBS = ("waits for", "belongs to", "looks like", "runs past", "remembers", "leads to")


def byte_tokenizer(template: str | None = CHATML, *, extra: Iterable[str] = (), **special: str) -> Any:
    """Return a fast tokenizer with one token per byte (id = byte in byte-level order) and the special tokens.

    Args:
        template: the chat template; None for a tokenizer without one.
        extra: more special tokens.
        special: `eos_token`, `bos_token` and so on; end and pad token default to `<|im_end|>` and `<|pad|>`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    named = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | special
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *named.values(), *extra])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = template
    return tokenizer


def byte_state(template: str | None = CHATML, *, extra: Iterable[str] = (), **special: str) -> TokenizerState:
    """Return the state of a `byte_tokenizer`."""
    from onward.data.tokenizer import TokenizerState

    return TokenizerState.of(byte_tokenizer(template, extra=extra, **special))


def save_tiny_model(
    directory: Path, *, layers: int = 1, hidden: int = 32, seed: int = 0, tokenizer: Any = None
) -> Path:
    """Save a random Llama in float32 with its tokenizer, as `from_pretrained` reads them; return `directory`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` short chats of one or two turns, a function of the seed."""
    source = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        messages: list[dict[str, str]] = []
        for _ in range(source.choice((1, 1, 1, 2))):
            subject, verb, thing = source.choice(SUBJECTS), source.choice(VERBS), source.choice(SUBJECTS)
            messages.append({"role": "user", "content": f"{number}: what {verb} {thing}?"})
            messages.append({"role": "assistant", "content": f"{subject.capitalize()} {verb} {thing}."})
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value per line; return `path`."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
