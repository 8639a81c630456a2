"""Start: from a process to its first step, against a script that only imports the libraries and loads the model.

`python bench/start.py [ROUNDS]`. `onward train FILE` on smollm2-135m, which is in the cache; a first step begins with
the line that names the file. Both sides end there.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from measuring import held_against, interleaved, python, seconds_until, spread, write_rows

MODEL = "smollm2-135m"
GOAL = 1.35
BARE = """
import sys, torch, transformers, peft
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)
print("loaded", file=sys.stderr, flush=True)
"""
FIRST_STEP = "file 1: "


def measure(rounds: int = 5, rows: int = 100) -> dict[str, Any]:
    """Return the seconds to the first step of `onward train` and those of the bare script."""
    from onward import Run
    from onward.training.model.base import resolve_base

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fresh, file = folder / "fresh", write_rows(folder / "day-1.jsonl", rows)
        base = resolve_base(MODEL, report=lambda _: None)
        Run.create(fresh, MODEL)
        bare = python("-c", BARE.format(base=str(base)))
        numbers = count()

        def seconds(side: str) -> float:
            if side == "bare":
                return seconds_until(bare, "loaded")
            run = folder / f"run-{next(numbers)}"
            shutil.copytree(fresh, run)
            return seconds_until(python("-m", "onward", "train", file, "--run", run), FIRST_STEP)

        interleaved(("bare", "onward"), 1, seconds)  # reads the files of libraries and model into memory for both
        found = interleaved(("bare", "onward"), rounds, seconds)
    ratios = [ours / bare for ours, bare in zip(found["onward"], found["bare"], strict=True)]
    return {
        "seconds": {side: spread(values) for side, values in found.items()},
        "ratio": spread(ratios),
        "against_imports_and_load": held_against(GOAL, statistics.median(ratios), at_most=True),
    }


def main() -> None:
    """Print the figures as JSON."""
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
