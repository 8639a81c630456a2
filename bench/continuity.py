"""The comparison of the README: the usual recipe and Onward on the same three files, side by side.

Both sides are measured by their own uninterrupted run: what differs is only that the files come one after another,
each in a process of its own. `python bench/continuity.py` prints a table; `--json` the numbers behind it; `--write
README.md` puts the table between that file's markers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipe

from onward import Run
from onward.config import Config
from onward.data.plan.order import make_plan, rows_digest
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

BEGIN, END = "<!-- continuity:begin -->", "<!-- continuity:end -->"
KILL_AT_STEPS = (3, 9, 19)
"""Steps at which the killed variant's process is ended by SIGKILL, once in each file."""


def onward(*words: str, wait: bool = True) -> subprocess.Popen[str]:
    """Run the command line in a process of its own, on one thread like the recipe's processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "onward", *words]
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if wait:
        _, problem = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"onward {' '.join(words)}:\n{problem[-3000:]}")
    return process


def make_run(root: Path, base: Path, settings: recipe.Settings) -> Run:
    """Make a run with the recipe's settings."""
    values = {
        "batch_size": settings.batch_size, "epochs": settings.epochs, "learning_rate": settings.learning_rate,
        "lora.rank": settings.rank, "lora.alpha": settings.alpha, "lora.dropout": settings.dropout,
        "seed": settings.seed, "warmup_steps": 0, "max_length": 512, "save_steps": 2,
    }  # fmt: skip
    onward("init", str(root), "--model", str(base), *(f"--set={key}={value}" for key, value in values.items()))
    return Run(root)


def train_killed(run: Run, files: Sequence[Path]) -> None:
    """Train file after file; each process is killed once and `onward train` continues."""
    for path, step in zip(files, KILL_AT_STEPS, strict=True):
        process = onward("train", str(path), "--run", str(run.layout.root), wait=False)
        while process.poll() is None and run.status()["global_step"] < step:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        onward("train", "--run", str(run.layout.root))


def measure_onward(work: Path, base: Path, files: Sequence[Path], settings: recipe.Settings) -> list[dict[str, Any]]:
    """Return Onward's rows of the comparison: files in processes of their own, and the same with kills."""
    whole, parts, killed = (make_run(work / name, base, settings) for name in ("whole", "parts", "killed"))
    onward("train", *map(str, files), "--run", str(whole.layout.root))
    for path in files:
        onward("train", str(path), "--run", str(parts.layout.root))
    train_killed(killed, files)
    return [
        describe("onward", "onward train FILE, one process per file", parts, whole),
        describe("onward_killed", "the same, every process killed once (SIGKILL) and restarted", killed, whole),
    ]


def describe(name: str, what: str, run: Run, whole: Run) -> dict[str, Any]:
    """Return one row in the form of `recipe`'s results, from the run's ledger."""
    weights = "adapter_model.safetensors"
    off = recipe.distance(
        run.layout.current / weights, whole.layout.current / weights, whole.layout.boundary(0) / weights
    )
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        files = [describe_file(ledger, row, run.config) for row in ledger.files("done")]
    return {"name": name, "what": what, "files": files, "distance": off, "verified": run.verify().ok}


def describe_file(ledger: Ledger, row: FileRow, config: Config) -> dict[str, Any]:
    """Count the rows that the recorded steps of a file trained, by the digest of each step's rows."""
    plan = make_plan(row.sha256, row.rows, config, row.occurrence)
    planned = {rows_digest(rows, plan.sources): rows for rows in map(plan.rows_at, range(plan.steps))}
    steps = ledger.steps(row.id)
    counts = Counter(reference for step in steps for reference in planned[step.rows_digest])
    return {
        "name": row.name,
        "rows": row.rows,
        "rows_trained": len(counts),
        "rows_repeated": sum(count > config.epochs for count in counts.values()),
        "steps": len(steps),
        "steps_due": math.ceil(row.rows / config.batch_size) * config.epochs,
        "learning_rates": [step.learning_rate for step in steps],
    }


def table(variants: Sequence[dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table."""
    lines = [
        "| | rows trained (of) | repeated | steps (due) | learning rate, first to last of each file | distance |",
        "|---|---|---|---|---|---|",
    ]
    for variant in variants:
        files = variant["files"]
        trained = ", ".join(f"{file['rows_trained']} ({file['rows']})" for file in files)
        repeated = sum(file["rows_repeated"] for file in files)
        steps = ", ".join(f"{file['steps']} ({file['steps_due']})" for file in files)
        rates = "; ".join(_rates(file["learning_rates"]) for file in files)
        off = variant["distance"]
        far = "no such run" if off is None else f"{off['max_abs']:.2g} ({off['relative']:.1%})" if off["l2"] else "0"
        lines.append(f"| {variant['what']} | {trained} | {repeated} | {steps} | {rates} | {far} |")
    return "\n".join(lines)


def _rates(rates: Sequence[float]) -> str:
    return f"{rates[0]:.2g} to {rates[-1]:.2g}" if rates else "none"


def compare(work: Path) -> dict[str, Any]:
    """Measure both sides under `work`."""
    settings = recipe.Settings()
    result = recipe.compare_recipes(work, settings)
    files = sorted((work / "files").glob("*.jsonl"))
    result["variants"] += measure_onward(work, work / "base", files, settings)
    return result


def main() -> None:
    """Print the comparison, or write it into a document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the numbers instead of the table")
    parser.add_argument("--write", type=Path, help="a document with the two markers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = compare(Path(scratch))
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    text = f"{table(result['variants'])}\n\nMeasured with {versions}."
    print(json.dumps(result, indent=2) if arguments.json else text)
    if arguments.write:
        before, _, rest = arguments.write.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
