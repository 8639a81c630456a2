"""Resume: seconds from a process to its first step, cold and from a checkpoint early and late in one long file.

`python bench/resume.py [ROUNDS] [FAR]`. The file has a few more short rows than FAR (1,000,000); the model is the 15M
Llama, trained whole. Ten steps are trained, then the cursor is set by hand and committed, so that nobody trains a
million rows. The peer resumes from copies of the same checkpoints, with Onward's tokens mapped into memory.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from measuring import held_against, interleaved, python, seconds_until, small_llama, spread

from onward import Run
from onward.config import Config
from onward.service.session import open_session
from onward.service.state.commits import Commit, Commits
from onward.service.state.retention import Retention
from onward.service.state.settle import Settlement
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger
from onward.training.checkpoints.loading import load_state
from onward.training.measuring.probe import Probe

BATCH, TRAINED, NEAR = 8, 10, 1000
COLD_GOAL, POSITION_GOAL = 1.15, 1.15
STOCK = Path(__file__).with_name("stock.py")


def silent(_: object) -> None:
    """Print nothing."""


def write_rows(path: Path, rows: int) -> Path:
    """Write short rows, each with a text of its own."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(f'{{"text": "Row {number} of a long file."}}\n' for number in range(rows))
    return path


def train_some(run: Run) -> None:
    """Train the first steps of the waiting file, and commit."""
    stop = Wishes()

    def observe(event: object) -> None:
        if getattr(event, "step", 0) >= TRAINED:
            stop.ask("enough")

    run.train(observe=observe, stop=stop)


def move(run: Run, step: int) -> None:
    """Set the cursor of a stopped run to a step of its file and commit, as if the steps before had been trained."""
    with Ledger(run.layout.ledger) as ledger:
        session = open_session(run.layout, ledger, report=silent)
        commits = Commits(run.layout, ledger)
        settled = Settlement(run.layout, ledger, Retention.of(session.config)).settle()
        assert settled.folder is not None
        assert settled.manifest is not None
        config = Config.model_validate(settled.manifest.config)
        state = load_state(settled.folder, settled.manifest, replace(session.spec, config=config))
        ahead = step - state.cursor.step
        state.cursor = replace(state.cursor, step=step)
        state.counters.step += ahead
        state.counters.adam_origin += ahead
        row = ledger.at_position(state.cursor.position)
        assert row is not None
        probed = Probe(state.model, config.seed, session.device, session.dtype).of_model()
        commits.commit(
            Commit(
                state.model, state.snapshot(), config, lambda: probed, session.facts(), parent=settled.manifest,
                file_id=row.id,
            )
        )  # fmt: skip


def starter(run: Run) -> Callable[[], float]:
    """Return a function that restores the ledger as it is now and measures `onward train` up to its first step."""
    kept = run.layout.ledger.read_bytes()

    def start() -> float:
        for path in run.layout.root.glob(f"{run.layout.ledger.name}*"):
            path.unlink()
        run.layout.ledger.write_bytes(kept)
        return seconds_until(python("-m", "onward", "train", "--run", run.layout.root), "file 1: ")

    return start


def measure(rounds: int = 3, far: int = 1_000_000) -> dict[str, Any]:
    """Return the seconds of each start and the ratios of the goals."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, file = small_llama(folder / "model"), write_rows(folder / "long.jsonl", far + 1000)
        settings = {"method": "full", "batch_size": BATCH, "max_length": 512, "warmup_steps": 0}
        run = Run.create(folder / "queued", str(model), **settings)
        run.add(file)
        places = {"near": NEAR // BATCH, "far": far // BATCH}
        runs = {name: folder / name for name in places}
        shutil.copytree(folder / "queued", runs["near"])
        train_some(Run(runs["near"]))
        shutil.copytree(runs["near"], runs["far"])
        for name, step in places.items():
            move(Run(runs[name]), step)
        warm = {name: starter(Run(path)) for name, path in runs.items()}
        tokens = next(path for path in run.layout.tokens.iterdir() if path.is_dir())
        numbers = count()

        def seconds(side: str) -> float:
            who, place = side.split()
            number = next(numbers)
            if who == "trainer":
                job: dict[str, Any] = {"model": str(model), "rows": str(tokens), "method": "full", "resume": None}
                job |= {"out": str(folder / f"out-{number}"), "steps": places.get(place, 0) + TRAINED}
                if place in places:
                    job["resume"] = str(Run(runs[place]).layout.checkpoint(places[place]))
                return seconds_until(python(STOCK, json.dumps(job)), "first step")
            if place in places:
                return warm[place]()
            fresh = folder / f"cold-{number}"
            shutil.copytree(folder / "queued", fresh)
            found = seconds_until(python("-m", "onward", "train", "--run", fresh), "file 1: ")
            shutil.rmtree(fresh)
            return found

        ours, theirs = ([f"{who} {place}" for place in ("cold", *places)] for who in ("onward", "trainer"))
        interleaved(ours[:1], 1, seconds)  # libraries, model and tokens are in memory for all
        found = interleaved(ours, rounds, seconds) | interleaved(theirs, 1, seconds)  # theirs may take minutes
    return {
        "rows": {"near": NEAR, "far": far},
        "seconds": {side: spread(times) for side, times in found.items()},
        "resume_to_cold": _ratio(found, "near", "cold", COLD_GOAL),
        "far_to_near": _ratio(found, "far", "near", POSITION_GOAL),
    }


def _ratio(found: dict[str, list[float]], place: str, other: str, goal: float) -> dict[str, Any]:
    ratios = {
        who: statistics.median(found[f"{who} {place}"]) / statistics.median(found[f"{who} {other}"])
        for who in ("onward", "trainer")
    }
    return {**ratios, "held": held_against(goal, ratios["onward"], at_most=True)}


def main() -> None:
    """Print the figures as JSON."""
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
