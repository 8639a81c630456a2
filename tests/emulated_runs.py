"""Runs on an emulated GPU (`emulated/`), in a process that has one: prints what was seen, as JSON.

The device computes with the kernels of the CPU, so nothing is said about those of a GPU. All that Onward does around
them is the same: where tensors are and who waits, what is recorded and replayed, what is copied behind training.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small
import tiny
import torch
from runs import kill_at

from onward import Run
from onward.events import StepTaken
from onward.training.checkpoints.checkpoint import Manifest, inspect_checkpoint

FORK: Any = multiprocessing.get_context("fork")
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16", "batch_size": 2, "max_length": 128, "evaluation": {"share": 0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {**BFLOAT16, "lora": {"rank": 4, "dropout": 0.1}},
    "full": {**BFLOAT16, "method": "full", "learning_rate": 1e-4},
    "recomputed": {**BFLOAT16, "lora": {"rank": 4, "dropout": 0.1}, "activation_checkpointing": "on"},
    "anchored": {
        **BFLOAT16,
        "lora": {"rank": 4, "dropout": 0.1, "trainable_tokens": [65, 66, 70]},
        "anchor": {"weight": 0.5, "rows": 8, "tokens": 16},
    },
}
SIZE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
"""Heads that the attention of one call takes."""


class Seen:
    """An observer: what the device did in each step."""

    def __init__(self) -> None:
        import emulated_device

        self.device = emulated_device
        self.waits: list[int] = []

    def __call__(self, event: object) -> None:
        """Count at each step how often the process has waited for the device so far."""
        if isinstance(event, StepTaken):
            self.waits.append(self.device.waits())

    def facts(self) -> dict[str, Any]:
        """Return the waits of each step but the first, the replays, and the copies that were done late."""
        between = [later - earlier for earlier, later in zip(self.waits, self.waits[1:], strict=False)]
        return {"waits": between, "replays": torch.cuda.CUDAGraph.replays, "late": self.device.put_off()}  # type: ignore[attr-defined]


def in_process(work: Callable[[], Any]) -> tuple[int, Any]:
    """Do something in a process of its own; return its exit status, negative for a signal, and what it returned."""
    here, there = FORK.Pipe(duplex=False)

    def carry_out() -> None:
        torch.set_num_threads(1)  # before any thread does, which a fork leaves broken
        there.send(work())

    process = FORK.Process(target=carry_out)
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = None
    process.join()
    return process.exitcode, found


def made(root: Path, base: Path, settings: dict[str, Any]) -> Run:
    """Make a run in a process of its own, with the model's admission."""
    return Run(in_process(lambda: Run.create(root, str(base), **settings).layout.root)[1])


def train(run: Run, *files: Path) -> tuple[int, Any]:
    """Train in a process of its own."""

    def work() -> dict[str, Any]:
        seen = Seen()
        run.train(*files, observe=seen)
        return seen.facts()

    return in_process(work)


def without_room(run: Run, *files: Path) -> tuple[int, Any]:
    """Train on a device whose memory is full after the second step, until that was noticed."""

    def work() -> list[str]:
        import emulated_device as device

        total, kinds = device.memory()[2], list[str]()

        def observe(event: object) -> None:
            kinds.append(type(event).__name__)
            is_second = kinds[-1] == "StepTaken" and 2 == kinds.count("StepTaken")
            device.set_total(device.memory()[0] if is_second else total)

        run.add(*files)
        run.watch(once=True, observe=observe)
        return kinds

    return in_process(work)


def manifest_of(run: Run) -> Manifest:
    """Return the manifest of the newest checkpoint, which verifies."""
    manifest = inspect_checkpoint(run.layout.checkpoints()[0]).verified
    assert manifest is not None
    return manifest


def faults(run: Run) -> list[str]:
    """Return what a proof with a replay finds wrong."""
    return [check.detail for check in run.verify(deep=True).checks if not check.ok]


def look(root: Path, variant: str) -> dict[str, Any]:
    """Train three files in one process and in several, of which one is killed."""
    base = root / "base"
    tiny.byte_tokenizer().save_pretrained(base)
    small.small_model("llama", **SIZE).save_pretrained(base)
    files = [tiny.write_jsonl(root / f"{seed}.jsonl", tiny.chat_rows(24, seed=seed)) for seed in (1, 2, 3)]
    one, several = (
        made(root / name, base, {**VARIANTS[variant], "save_steps": steps})
        for name, steps in (("one", 1000), ("several", 5))
    )
    status, facts = train(one, *files)
    killed = [
        train(several, files[0])[0],
        in_process(lambda: several.train(files[1], observe=kill_at(19)))[0],
        train(several)[0],
    ]
    return {
        "statuses": [status, *killed, train(several, files[2])[0]],
        "measured": [manifest_of(run).measurement for run in (one, several)],
        "handovers": [entry["handover"] for run in (one, several) for entry in run.history()],
        "faults": in_process(lambda: faults(several))[1],
        "environment": manifest_of(one).environment,
        **facts,
    }


def look_at_experts(root: Path) -> dict[str, Any]:
    """Train a model with experts, and one file on a device whose memory is full for a while."""
    base = root / "base"
    tiny.byte_tokenizer().save_pretrained(base)
    small.small_model("qwen3_moe").save_pretrained(base)
    files = [tiny.write_jsonl(root / f"{seed}.jsonl", tiny.chat_rows(12, seed=seed)) for seed in (1, 2)]
    run = made(root / "run", base, {**BFLOAT16, "lora": {"rank": 4, "dropout": 0.0}})
    status, _ = train(run, files[0])
    other, events = without_room(run, files[1])
    return {
        "statuses": [status, other],
        "starts": events.count("FileStarted"),
        "faults": in_process(lambda: faults(run))[1],
        "states": [entry["state"] for entry in run.history()],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, what = Path(sys.argv[1]), sys.argv[2]
    place.mkdir()
    print(json.dumps(look_at_experts(place) if what == "experts" else look(place, what)))
