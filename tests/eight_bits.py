"""AdamW with moments of 8 bits in a process of its own, where bitsandbytes may be installed: prints what was seen.

bitsandbytes makes `import peft` seconds slower, so it lies in a folder of its own (`make qlora`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import stock
import tiny
import torch
from bitsandbytes.optim import AdamW8bit as Theirs
from qlora import forked
from runs import kill_at
from torch import nn
from transformers import AutoModelForCausalLM

from onward import Run
from onward.errors import OnwardError
from onward.training.checkpoints.checkpoint import inspect_checkpoint
from onward.training.optimizers import ADAMW_8BIT
from onward.training.optimizers.blockwise import BlockwiseAdamW
from onward.training.state import TrainState

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "method": "full",
    "optimizer": "adamw_8bit",
    "batch_size": 2,
    "max_length": 64,
    "save_steps": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
}
SHAPES = ((70, 61), (4096,), (33, 5))
"""Moments of 8 bits with a block that is not full, with full blocks, and a small weight with moments of 32."""


def against_theirs() -> bool:
    """Whether equal gradients give the weights and moments of bitsandbytes' own optimizer, bit for bit."""
    source = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=source) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in first] for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8}
    mine = BlockwiseAdamW([{"params": ours, "weight_decay": 0.1}], **settings)
    other = Theirs(theirs, weight_decay=0.1, **settings)
    for _ in range(5):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=source)
            two.grad = one.grad.clone()
        mine.step()
        other.step()
    kept = [mine.state[one][slot].equal(other.state[two][slot]) for one, two in zip(ours, theirs, strict=True)
            for slot in mine.state[one]
            if slot != "step"]  # fmt: skip
    return all(kept) and all(map(torch.equal, ours, theirs)) and not torch.equal(first[0], ours[0])


def journeys(root: Path, base: Path) -> dict[str, Any]:
    """Train two runs of the same files, one of them killed and gone on with; a third begins its moments anew."""
    files = [tiny.write_jsonl(root / f"{seed}.jsonl", tiny.chat_rows(6, seed=seed)) for seed in (1, 2)]
    whole, killed = (Run.create(root / name, str(base), **SETTINGS) for name in ("whole", "killed"))
    anew = Run.create(root / "anew", str(base), boundary="reset_moments", **SETTINGS)
    statuses = [
        forked(lambda: whole.train(*files)),
        forked(lambda: killed.train(files[0], observe=kill_at(2))),
        forked(lambda: killed.train()),
        forked(lambda: killed.train(files[1])),
        forked(lambda: anew.train(*files)),
    ]
    folders = [run.layout.checkpoints()[0] for run in (whole, killed)]
    manifests = [inspect_checkpoint(folder).verified for folder in folders]
    return {
        "statuses": statuses,
        "measured": [manifest.measurement for manifest in manifests if manifest is not None],
        "files": [(folder / "optimizer.pt").read_bytes() == (folders[0] / "optimizer.pt").read_bytes()
                  for folder in folders],
        "checks that fail": [check.detail for run in (killed, anew) for check in run.verify(deep=True).checks
                             if not check.ok],
        "steps of Adam": stock.open_state(anew.layout.root).view().adam_step(),
        "bytes": bytes_of(stock.open_state(whole.layout.root)),
    }  # fmt: skip


def bytes_of(state: TrainState) -> list[int]:
    """Return the bytes of the moments as they are and as the method says, and those of AdamW's."""
    view = state.view()
    kept = sum(value.nbytes for entry in view.moments.values() for slot, value in entry.items() if slot != "step")
    return [kept, ADAMW_8BIT.bytes(view.weights), 2 * sum(weight.nbytes for weight in view.weights.values())]


def adopted(saved: Path, root: Path, trainer: Any, **settings: Any) -> dict[str, Any]:
    """Adopt what a Trainer saved, and compare weights and moments."""
    run = Run.adopt(saved, root, settings={"max_length": 64, **settings})
    state = stock.open_state(root)
    theirs = {
        f"{name}.{slot}": value
        for name, weight in trainer.model.named_parameters()
        for slot, value in trainer.optimizer.state[weight].items()
        if torch.is_tensor(value) and not slot.startswith("qmap")
    }
    ours = {name: value for name, value in stock.moments(state.model, state.optimizer).items() if ".step" not in name}
    return {
        "optimizer": run.config.optimizer,
        "step": run.status()["global_step"],
        "same": ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours),
        "verifies": run.verify().ok,
    }


def with_trainers(root: Path, base: Path) -> dict[str, Any]:
    """A Trainer goes on from our checkpoint and is adopted again; so is one that began by itself; and ours."""
    file = tiny.write_jsonl(root / "ours.jsonl", tiny.chat_rows(8))
    ours = Run.create(root / "ours", str(base), **SETTINGS)
    ours.train(file)
    settings: dict[str, Any] = {"optim": "adamw_bnb_8bit", "save_strategy": "steps", "save_steps": 2}
    model = AutoModelForCausalLM.from_pretrained(base)
    on = stock.trainer(model, root / "on", max_steps=6, **settings)
    on.train(resume_from_checkpoint=str(ours.layout.checkpoints()[0]))
    fresh = stock.trainer(AutoModelForCausalLM.from_pretrained(base), root / "fresh", max_steps=2, **settings)
    fresh.processing_class = tiny.byte_tokenizer()
    fresh.train()
    tiny.byte_tokenizer().save_pretrained(root / "on" / "checkpoint-6")
    refused = ""
    try:
        Run.adopt(root / "fresh" / "checkpoint-2", root / "refused", settings={"optimizer": "adamw"})
    except OnwardError as error:
        refused = error.what
    again = Run.adopt(ours.layout.checkpoints()[0], root / "own", str(base))
    return {
        "gone on with": adopted(root / "on" / "checkpoint-6", root / "adopted on", on),
        "fresh": adopted(root / "fresh" / "checkpoint-2", root / "adopted fresh", fresh),
        "own": again.config.optimizer,
        "refused": refused,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    model = tiny.save_tiny_model(place / "base", hidden=64)
    print(json.dumps({"equal": against_theirs(), **journeys(place, model), **with_trainers(place, model)}))
