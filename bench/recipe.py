"""The usual recipe for training file after file: stock Trainer, keep the last checkpoint, resume from it on the next.

Every file is trained in a process of its own by an unchanged `transformers.Trainer` with PEFT LoRA; a subclass only
notes which rows and which learning rate each step took. The measure is the recipe's own: its final weights against one
stock Trainer that trains the same batches in the same order without a stop. `python bench/recipe.py` prints the result:

    {
      "versions": {"transformers": str, "torch": str, "peft": str},
      "variants": [
        {
          "name": str,                     # a key of VARIANTS
          "what": str,                     # the variant in one line
          "files": [
            {
              "name": str, "rows": int,    # the file, and the rows in it
              "rows_trained": int,         # different rows that a step was taken on
              "rows_repeated": int,        # rows that were trained more often than the epochs ask for
              "steps": int,                # optimizer steps that this process took
              "steps_due": int,            # steps that the file should take
              "global_step": int,          # the Trainer's counter afterwards
              "learning_rates": [float],   # of every step taken, read from the optimizer as it steps
              "resumed_from": str | null,  # the checkpoint that the process went on from
              "kept": [str],               # the checkpoints that the recipe left for the next file
              "seconds": float             # of training, without imports and loading
            }
          ],
          "distance": {                    # of the final trainable weights from the uninterrupted run
            "max_abs": float, "l2": float, "relative": float  # relative: l2 / l2 that the uninterrupted run moved
          } | null                         # null where one shuffle over all files would be another order
        }
      ]
    }
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import material
from recipe_process import START, FileResult, Job, Settings, checkpoints, steps_due

PROCESS = Path(__file__).with_name("recipe_process.py")


@dataclass(frozen=True)
class Variant:
    """One way in which people follow the recipe.

    Attributes:
        what: the variant in one line.
        schedule: `lr_scheduler_type`; the Trainer's default is `linear`.
        order: `train_sampling_strategy`; the Trainer's default is `random`.
        extend: whether `max_steps` is set to the steps so far plus those of the file.
        newest_by: how the last checkpoint is found: sorted as `text` or by `number`.
        stop_at: step at which the process ends, as by an interruption; the next process takes the same file.
        dropout: LoRA dropout, if another than the settings'.
    """

    what: str
    schedule: str = "linear"
    order: str = "sequential"
    extend: bool = False
    newest_by: str = "text"
    stop_at: int | None = None
    dropout: float | None = None


VARIANTS = {
    "resume": Variant("resume_from_checkpoint on the next file"),
    "max_steps": Variant("the same with max_steps = steps so far + steps of this file", extend=True),
    "careful": Variant(
        "max_steps, newest checkpoint by number, constant learning rate, rows in file order",
        schedule="constant",
        extend=True,
        newest_by="number",
    ),
    "careful_shuffled": Variant(
        "the careful one with the Trainer's default shuffling",
        schedule="constant",
        order="random",
        extend=True,
        newest_by="number",
    ),
    "same_file_resume": Variant(
        "one file, interrupted at step 6 and resumed, dropout 0: what resuming was made for",
        order="random",
        newest_by="number",
        stop_at=6,
        dropout=0.0,
    ),
}


@dataclass(frozen=True)
class RecipeResult:
    """A variant's files and the path of its final trainable weights."""

    name: str
    what: str
    files: list[FileResult]
    weights: Path


def train_recipe(name: str, files: Sequence[Path], base: Path, out: Path, settings: Settings) -> RecipeResult:
    """Train `files` one after another into `out` as the variant `name` says, one process each."""
    variant = VARIANTS[name]
    if variant.dropout is not None:
        settings = replace(settings, dropout=variant.dropout)
    results: list[FileResult] = []
    for number, path in enumerate(files):
        job = Job(
            base=str(base),
            file=str(path),
            out=str(out),
            settings=settings,
            schedule=variant.schedule,
            order=variant.order,
            newest_by=variant.newest_by,
            max_steps=_global_step(out) + steps_due(path, settings) if variant.extend else -1,
            stop_at=variant.stop_at if number == 0 else None,
            resume=_newest_checkpoint(out, variant.newest_by),
        )
        results.append(_in_own_process(job))
    return RecipeResult(name, variant.what, results, out / "adapter_model.safetensors")


def train_uninterrupted(files: Sequence[Path], like: str, base: Path, out: Path, settings: Settings) -> RecipeResult:
    """Train the rows of `files` in one go with the schedule, order and dropout of the variant `like`."""
    out.mkdir(parents=True)
    joined = out / "joined.jsonl"
    joined.write_bytes(b"".join(path.read_bytes() for path in files))
    variant = VARIANTS[like]
    if variant.dropout is not None:
        settings = replace(settings, dropout=variant.dropout)
    job = Job(str(base), str(joined), str(out), settings, variant.schedule, variant.order, "number")
    result = _in_own_process(job)
    return RecipeResult("uninterrupted", f"one stock Trainer, as {like}", [result], out / "adapter_model.safetensors")


def distance(weights: Path, reference: Path, start: Path) -> dict[str, float]:
    """Return how far `weights` are from `reference`, absolutely and relative to how far `start` is from it."""
    from safetensors.numpy import load_file

    ours, theirs, origin = load_file(weights), load_file(reference), load_file(start)
    off = [ours[name].astype("float64") - theirs[name] for name in theirs]
    way = [theirs[name].astype("float64") - origin[name] for name in theirs]
    l2 = math.sqrt(sum(float((part**2).sum()) for part in off))
    moved = math.sqrt(sum(float((part**2).sum()) for part in way))
    return {"max_abs": max(float(abs(part).max()) for part in off), "l2": l2, "relative": l2 / moved}


def compare_recipes(work: Path, settings: Settings | None = None) -> dict[str, Any]:
    """Run every variant and its uninterrupted reference under `work`; return the result in the module's docstring."""
    settings = settings or Settings()
    base, files = material.write_base(work / "base"), material.write_files(work / "files")
    with ThreadPoolExecutor(max_workers=2) as pool:
        measured = [pool.submit(_measure, name, files, base, work, settings) for name in VARIANTS]
        variants = [future.result() for future in measured]
    return {"versions": {name: version(name) for name in ("transformers", "torch", "peft")}, "variants": variants}


def _measure(name: str, files: Sequence[Path], base: Path, work: Path, settings: Settings) -> dict[str, Any]:
    """Train a variant and, if there is one, its reference, and put both into the form of the module's docstring."""
    variant = VARIANTS[name]
    stops_inside = variant.stop_at is not None
    stream = [files[1]] * 2 if stops_inside else files
    tried = train_recipe(name, stream, base, work / name, settings)
    off = None
    if stops_inside or variant.order == "sequential":
        reference = train_uninterrupted(
            list(dict.fromkeys(stream)), name, base, work / f"{name}-uninterrupted", settings
        )
        off = distance(tried.weights, reference.weights, reference.weights.with_name(START))
    return {"name": name, "what": tried.what, "files": [asdict(result) for result in tried.files], "distance": off}


def _global_step(out: Path) -> int:
    """Return the step counter that `save_state` left at the root of `out`, or 0."""
    state = out / "trainer_state.json"
    return int(json.loads(state.read_text())["global_step"]) if state.is_file() else 0


def _newest_checkpoint(out: Path, newest_by: str) -> str | None:
    found = checkpoints(out, newest_by)
    return str(found[-1]) if found else None


def _in_own_process(job: Job) -> FileResult:
    """Run a job in a fresh interpreter, on one thread so that equal work gives equal bits."""
    command = [sys.executable, str(PROCESS), json.dumps(asdict(job))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(job.file).name} in {job.out}:\n{done.stderr[-3000:]}")
    return FileResult(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the comparison as JSON, or run as one process of it."""
    parser = argparse.ArgumentParser(description="Measure the usual recipe by its own uninterrupted run.")
    parser.add_argument("--keep", type=Path, help="empty folder for base, files and weights, kept afterwards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(compare_recipes(arguments.keep or Path(scratch)), indent=2))


if __name__ == "__main__":
    main()
