"""The material of both sides of the benchmark: a tiny random Llama and three files made from the standard library."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path

ROWS = (40, 96, 24)
"""Rows of the three files. Batches of 8 divide them, so that one run over all rows has the same batches."""

MODULES = (
    "os.path", "shutil", "textwrap", "statistics", "random", "calendar", "inspect", "tempfile", "heapq", "bisect",
    "glob", "fnmatch", "locale", "base64", "binascii", "gzip", "math", "operator", "functools", "itertools", "ast",
    "asyncio", "email.utils", "html", "urllib.parse", "ipaddress", "colorsys", "cmath", "time", "datetime",
    "typing", "logging",
)  # fmt: skip


def write_base(folder: Path, *, seed: int = 0) -> Path:
    """Write a Llama of 2 layers, 64 wide, with random weights and a tokenizer whose tokens are bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_tokenizer(), eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_files(folder: Path, counts: tuple[int, ...] = ROWS) -> list[Path]:
    """Write one `text` file per count, each row a different fact, and return their paths in training order."""
    folder.mkdir(parents=True, exist_ok=True)
    facts, paths = docstring_facts(), []
    for number, count in enumerate(counts, start=1):
        path = folder / f"day-{number}.jsonl"
        rows = [json.dumps({"text": text}) for text in islice(facts, count)]
        if len(rows) < count:
            raise ValueError(f"the standard library gave {len(rows)} of {count} rows for {path.name}")
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def docstring_facts() -> Iterator[str]:
    """Yield `module.function: first line of its docstring` for public functions, each text once."""
    seen: set[str] = set()
    for name in MODULES:
        module = import_module(name)
        for attribute in sorted(vars(module)):
            value = getattr(module, attribute)
            if attribute.startswith("_") or not inspect.isroutine(value):
                continue
            line = (inspect.getdoc(value) or "").partition("\n")[0].strip()
            if 10 <= len(line) <= 90 and line not in seen:
                seen.add(line)
                yield f"{name}.{attribute}: {line}"
