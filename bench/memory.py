"""What `onward init` says of memory, against what a process that trains takes: `memory.py [KEY=VALUE ...]`.

The default model on a CPU. The estimate is made as `init` makes it; the file is trained by a process of its own, with
rows of full length and a commit after every step, and its peak is what the system counted (`ru_maxrss`). Without keys
all of `CASES` are measured, one after another, and printed as a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import docstrings, environment, python

MODEL = "smollm2-135m"
GOAL = 0.15
STEPS, ROWS = 2, 8
CASES: tuple[tuple[str, ...], ...] = (
    ("max_length=256",),
    ("max_length=1024",),
    ("max_length=2048",),
    ("max_length=1024", "activation_checkpointing=on"),
    ("max_length=2048", "activation_checkpointing=on"),
    ("max_length=256", "method=full"),
    ("max_length=1024", "method=full"),
    ("max_length=1024", "method=full", "activation_checkpointing=on"),
    ("max_length=256", "dtype=bfloat16"),
    ("max_length=1024", "dtype=bfloat16"),
    ("max_length=1024", "dtype=bfloat16", "activation_checkpointing=on"),
    ("max_length=256", "method=full", "dtype=bfloat16"),
)


def measure(settings: tuple[str, ...]) -> dict[str, Any]:
    """Make a run, train one file, and return the bytes that were estimated and measured."""
    from onward import Run
    from onward.config_text import parse_settings
    from onward.service.proof.memory import measure_memory, outlook
    from onward.store.ledger import Ledger

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        values = parse_settings(["save_steps=1", "over_length=truncate", "holdout=0", "evaluation.share=0", *settings])
        run = Run.create(folder / "run", MODEL, later=True, **values)
        with Ledger(run.layout.ledger) as ledger:
            measure_memory(run.layout, ledger)
        found = outlook(run.layout)
        assert found is not None
        said = found.estimate
        text = " ".join(docstrings())
        rows = [json.dumps({"text": text[place * 20000 : (place + 1) * 20000]}) for place in range(STEPS * ROWS)]
        file = folder / "rows.jsonl"
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        peak = peak_of(python("-m", "onward", "train", file, "--run", run.layout.root))
    return {"settings": list(settings), "estimate": said.total, "measured": peak, "off": said.total / peak - 1}


def peak_of(command: list[str]) -> int:
    """Return the most memory that a process had, in bytes.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        if status:
            raise RuntimeError(output.read().decode(errors="replace")[-2000:])
    return usage.ru_maxrss << 10


def main() -> None:
    """Measure one case, or print the table of all."""
    if sys.argv[1:]:
        print(json.dumps(measure(tuple(sys.argv[1:]))))
        return
    print("| settings | estimated GB | measured GB | off by |\n|---|---|---|---|")
    for case in CASES:
        done = subprocess.run(python(__file__, *case), env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {' '.join(case)} | failed: {done.stderr.strip().splitlines()[-1]} | | |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        sizes = f"{found['estimate'] / 1e9:.2f} | {found['measured'] / 1e9:.2f}"
        mark = "" if abs(found["off"]) <= GOAL else " (!)"
        print(f"| {' '.join(case)} | {sizes} | {found['off']:+.1%}{mark} |", flush=True)


if __name__ == "__main__":
    main()
