"""Runs on a GPU for the tests in `gpu/`: a random model, rows of very different lengths, processes that are killed.

With `ONWARD_GPU_TESTS=cpu` the same tests run on a CPU where they can: that checks the tests, and no kernel. With
`emulated` their rows are as short, for a GPU that is emulated.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from onward import Run
from onward.events import Committed, Event, FileStarted, StepTaken

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else one that looked for a GPU cannot be forked

IS_SMALL, ON_CPU = "ONWARD_GPU_TESTS" in os.environ, os.environ.get("ONWARD_GPU_TESTS") == "cpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
LENGTHS = (5, 4000, 17, 300, 64, 1200, 129, 33) if not IS_SMALL else (5, 400, 17, 30, 64, 120, 129, 33)
"""Tokens of the rows of one batch."""
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
VARIANTS: dict[str, dict[str, Any]] = {
    "lora-bfloat16": {"method": "lora", "dtype": "bfloat16", "lora": {"rank": 8, "dropout": 0.1}},
    "lora-float32": {"method": "lora", "dtype": "float32", "lora": {"rank": 8, "dropout": 0.0}},
    "full-bfloat16": {"method": "full", "dtype": "bfloat16", "learning_rate": 1e-4},
    "full-float32": {"method": "full", "dtype": "float32", "learning_rate": 1e-4},
    "anchored-bfloat16": {
        "method": "lora", "dtype": "bfloat16", "anchor": {"weight": 0.5, "rows": 8, "tokens": 32},
        "lora": {"rank": 8, "dropout": 0.1, "trainable_tokens": [65, 66, 70]},
    },
    "qlora-bfloat16": {"method": "qlora", "dtype": "bfloat16", "lora": {"rank": 8, "dropout": 0.0}},
}  # fmt: skip
SETTINGS = {"batch_size": len(LENGTHS), "max_length": 4096, "save_steps": 3, "warmup_steps": 2}
STEPS, FILES = 7, 3
"""Steps of each file."""

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
"""Marks of every test here: `pytestmark = needs_gpu`."""


def save_model(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """Save a random model with heads of 64 in groups, which FlashAttention takes, and a tokenizer of bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny.byte_tokenizer()
    width = 64 if ON_CPU else 256
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, max_position_embeddings=4224,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_files(folder: Path) -> list[Path]:
    """Write files whose every batch has rows of 5 to 4,000 tokens, in some order."""
    files: list[Path] = []
    for number in range(FILES):
        source = random.Random(number)
        letters = "".join(source.choices("abcdefghijklmnop qrstuvwxyz", k=max(LENGTHS)))
        rows = [{"text": letters[place:] + letters[:place]} for place in range(STEPS * len(LENGTHS))]
        cut = [{"text": row["text"][: LENGTHS[place % len(LENGTHS)]]} for place, row in enumerate(rows)]
        files.append(tiny.write_jsonl(folder / f"{number}.jsonl", cut))
    return files


def train_until(directory: str, files: Sequence[str], kind: type[Event], count: int) -> None:
    """Train in this process and kill it by SIGKILL when an event of a kind has come this often; never comes back."""
    left = [count]

    def observe(event: object) -> None:
        left[0] -= isinstance(event, kind)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    Run(directory).train(*files, observe=observe)
    os._exit(0)


INSTANTS: tuple[tuple[type[Event], int], ...] = (
    (StepTaken, 2), (Committed, 2), (StepTaken, 5), (FileStarted, 2), (StepTaken, 4)
)  # fmt: skip
"""Five instants, each counted from the start of a process: in a file, after a commit, at and across a boundary."""
