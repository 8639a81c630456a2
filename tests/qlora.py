"""Quantized LoRA in a process of its own, where bitsandbytes may be installed: prints what was seen, as JSON.

bitsandbytes makes `import peft` seconds slower, so it lies in a folder of its own (`make qlora`) that only this process
has on its path.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stock
import tiny
import torch
from peft import PeftModel
from runs import kill_at
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from onward import Run
from onward.config.text import read_config
from onward.training.checkpoints.checkpoint import inspect_checkpoint
from onward.training.checkpoints.loading import load_state
from onward.training.model.base import resolve_base
from onward.training.model.spec import ModelSpec
from onward.training.state import digest_tensors

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "method": "qlora",
    "batch_size": 2,
    "save_steps": 1,
    "lora": {"rank": 4, "dropout": 0.0},
}


def forked(work: Callable[[], object]) -> int:
    """Do something in a process of its own; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest_of(model: torch.nn.Module) -> str:
    """Return a digest of every parameter and buffer."""
    return digest_tensors(sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()))


def look(root: Path) -> dict[str, Any]:
    """Train two runs of the same two files, one of them killed and gone on with, and look at what they hold."""
    base = tiny.save_tiny_model(root / "base", layers=2, hidden=64)
    files = [tiny.write_jsonl(root / f"{seed}.jsonl", tiny.chat_rows(6, seed=seed)) for seed in (1, 2)]
    whole, killed = (Run.create(root / name, str(base), **SETTINGS) for name in ("whole", "killed"))
    statuses = [
        forked(lambda: whole.train(*files)),
        forked(lambda: killed.train(files[0], observe=kill_at(2))),
        forked(lambda: killed.train()),
        forked(lambda: killed.train(files[1])),
    ]
    folders = [run.layout.checkpoints()[0] for run in (whole, killed)]
    manifests = [inspect_checkpoint(folder).verified for folder in folders]
    assert manifests[0] is not None
    assert manifests[1] is not None
    config = read_config(killed.layout.config)
    state = load_state(folders[1], manifests[1], ModelSpec(config, resolve_base(config.model), CPU, torch.float32))
    before = digest_of(state.model)
    with torch.no_grad():
        state.model.eval()(input_ids=torch.arange(3, 9)[None])
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, device_map={"": CPU})
    adapted: Any = PeftModel.from_pretrained(plain, folders[1]).train()  # in evaluation its weights would be packed
    ids = torch.arange(3, 3 + stock.LENGTH)[None]
    with torch.no_grad():
        difference = (state.model(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max()
    return {
        "statuses": statuses,
        "measured": [manifest.measurement for manifest in manifests if manifest is not None],
        "changed by evaluation": digest_of(state.model) != before,
        "checks that fail": [check.detail for check in killed.verify(deep=True).checks if not check.ok],
        "difference to stock": float(difference),
        "four-bit weights": sum(weight.dtype == torch.uint8 for weight in state.model.parameters()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(look(Path(sys.argv[1]))))
