"""The estimated memory of a step against what it takes: `memory.py METHOD ROWS LENGTH [recompute] [rows] [8x512]`.

With `rows`, some rows of the vocabulary are trained; with `8x512`, the loss has an anchor of so many texts per step.
It runs the default model on a CPU, in a process of its own: the peak of resident memory in two steps, with the copy of
a commit beside the second, above what Python and its libraries held before the model was loaded; the peak of loading is
reported separately. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from measuring import forget_peak, resident, tune_process

STEPS = 2


def measure(method: str, rows: int, length: int, *options: str) -> dict[str, Any]:
    """Take two steps of one part and return the bytes that were estimated and measured."""
    tune_process()
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from onward.config import Config
    from onward.data.plan.loader import Batch
    from onward.data.plan.order import FilePlan, RowReference
    from onward.data.tokenized import Row
    from onward.training.device.execution import Execution
    from onward.training.model.base import resolve_base
    from onward.training.model.load import build_model
    from onward.training.model.spec import ModelSpec
    from onward.training.model.treatment import Treatment
    from onward.training.state import Cursor, TrainState
    from onward.training.steps.anchor import TOP, AnchorTerm
    from onward.training.steps.memory import largest_texts
    from onward.training.trainer import Trainer
    from onward.training.world import SingleProcess

    recompute, texts = "recompute" in options, [list(map(int, each.split("x"))) for each in options if "x" in each]
    count, tokens = texts[0] if texts else (0, 8)
    config = Config.model_validate({
        "method": method, "max_length": length, "activation_checkpointing": "on" if recompute else "off",
        "batch_size": max(rows, 8 * count), "lora": {"trainable_tokens": [1, 2, 40000] if "rows" in options else []},
        "anchor": {"weight": 0.5 if count else 0.0, "tokens": tokens},
    })  # fmt: skip
    base: Path = resolve_base("smollm2-135m", report=lambda _: None)
    before = resident()
    device = torch.device("cpu")
    model = build_model(ModelSpec(config, base, device, torch.float32), treatment=Treatment(end_to_end=True))
    state = TrainState.start(model, config)
    state.cursor = Cursor(1, "bench", 0, 1 << 20)
    shape = (config.anchor.rows, tokens - 1, TOP)
    text = Row(np.arange(tokens), np.arange(tokens) > 0)
    ids = torch.arange(TOP).expand(shape)
    anchor = AnchorTerm([text] * shape[0], ids, torch.full(shape, -5.0), config.anchor.weight) if count else None
    trainer = Trainer(state, config, Execution(SingleProcess(device), torch.float32), anchor)
    profile = trainer.economy.profile
    estimates = [profile.estimate([length] * rows, recompute=recompute, alone=True)]
    if count:
        estimates.append(profile.estimate(largest_texts(config), recompute=recompute, of_anchor=True))
    estimate = max(each.total for each in estimates)
    source = np.random.default_rng(0)
    made = [Row(source.integers(3, 40000, length), np.arange(length) > 0) for _ in range(rows)]
    batch = Batch(made, [RowReference("bench", place) for place in range(rows)], list(range(rows)))
    loaded = resident("VmHWM") - before
    forget_peak()
    for step in range(STEPS):
        kept = state.snapshot() if step else None  # as a process keeps it from its first commit on
        trainer.take_step(batch, FilePlan("bench", rows=1 << 23, batch_size=8, epochs=1, seed=0))  # type: ignore[arg-type]
    measured = resident("VmHWM") - before
    del kept
    return {
        "method": method, "rows": rows, "length": length, "options": options, "estimate": estimate,
        "measured": measured, "loaded": loaded, "off": estimate / measured - 1,
    }  # fmt: skip


if __name__ == "__main__":
    method, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(measure(method, rows, length, *sys.argv[4:])))
