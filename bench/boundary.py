"""Boundaries: from the last step of a file to the first of the next, and twenty small files end to end.

`python bench/boundary.py [ROWS] [FILES] [PEER_FILES] [LONGEST]`, LONGEST in characters of a row. Onward trains all
files in one process: once without measuring at boundaries what the model knows, which the peer does not do either, and
once with it. The peer, a stock Trainer at its best settings, takes one process per file. If it trains fewer files than
Onward, its time for all of them is extrapolated from the median of its files, and `extrapolated` says so.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import child, held_against, small_llama, spread, tune_process, write_rows

BATCH = 8
EVALUATION_GOAL = 0.05
"""The share of step time that measuring at boundaries may take."""
GAP_GOAL, PEER_GAP_GOAL, END_TO_END_GOAL = 1.0, 20.0, 5.0
STOCK = Path(__file__).with_name("stock.py")


def train_onward(folder: Path, model: Path, method: str, files: list[Path], share: float) -> dict[str, Any]:
    """Run as Onward's process: train all files in order; return the gaps between them and the seconds of its steps.

    Args:
        share: `evaluation.share`, what measuring at boundaries may take.
    """
    from onward import Run
    from onward.events import StepTaken

    steps: list[tuple[float, StepTaken]] = []

    def observe(event: object) -> None:
        if isinstance(event, StepTaken):
            steps.append((time.perf_counter(), event))

    settings = {
        "batch_size": BATCH, "max_length": 512, "over_length": "truncate", "learning_rate": 2e-4, "warmup_steps": 0,
        "method": method, "evaluation": {"share": share},
    }  # fmt: skip
    run = Run.create(folder, str(model), lora={"rank": 16, "alpha": 32, "dropout": 0.0}, **settings)
    tune_process()
    run.train(*files, observe=observe)
    crossed = [
        now - step.seconds - before
        for (before, last), (now, step) in pairwise(steps)
        if last.step_in_file == last.steps_in_file
    ]
    return {"gaps": crossed, "steps": [step.seconds for _, step in steps], "loss": steps[-1][1].loss}


def measure_onward(folder: Path, model: Path, method: str, files: list[Path], share: float = 0.0) -> dict[str, Any]:
    """Run Onward's process; return its gaps, its steps and its seconds from start to end."""
    begun = time.perf_counter()
    found = child(Path(__file__), "--onward", folder, model, method, share, *files)
    return {**found, "seconds": time.perf_counter() - begun}


def measure_peer(folder: Path, model: Path, method: str, files: list[Path], steps: int) -> dict[str, Any]:
    """Run the peer's processes, one per file; return their gaps, steps and seconds."""
    resume: str | None = None
    seconds: list[float] = []
    gaps: list[float] = []
    taken: list[float] = []
    last_end: float | None = None
    for number, path in enumerate(files, start=1):
        job = {
            "model": str(model), "rows": str(path), "out": str(folder), "method": method, "steps": number * steps,
            "resume": resume, "ignore_data_skip": True,
        }  # fmt: skip
        begun = time.perf_counter()
        found = child(STOCK, json.dumps(job))
        seconds.append(time.perf_counter() - begun)
        assert len(found["began"]) == steps
        gaps += [] if last_end is None else [found["began"][0] - last_end]
        taken += [end - begin for begin, end in zip(found["began"], found["ended"], strict=True)]
        last_end, resume = found["ended"][-1], found["checkpoint"]
    return {"gaps": gaps, "steps": taken, "seconds": seconds}


def compare(folder: Path, model: Path, method: str, files: list[Path], peer_files: int, rows: int) -> dict[str, Any]:
    """Measure both sides with one method."""
    steps = -(-rows // BATCH)
    ours = measure_onward(folder / f"onward-{method}", model, method, files)
    evaluating = measure_onward(folder / f"evaluating-{method}", model, method, files, EVALUATION_GOAL)
    peer = measure_peer(folder / f"peer-{method}", model, method, files[:peer_files], steps)
    assert len(ours["steps"]) == steps * len(files)
    whole = sum(peer["seconds"]) + (len(files) - peer_files) * statistics.median(peer["seconds"])
    step = statistics.median(ours["steps"])
    gap = statistics.median(ours["gaps"])
    more = statistics.fmean(evaluating["gaps"]) - statistics.fmean(ours["gaps"])
    in_steps, less, faster = gap / step, statistics.median(peer["gaps"]) / gap, whole / ours["seconds"]
    return {
        "files": len(files),
        "step_seconds": {"onward": spread(ours["steps"]), "trainer": spread(peer["steps"])},
        "gap_seconds": {"onward": spread(ours["gaps"]), "trainer": spread(peer["gaps"])},
        "gap_in_steps": held_against(GAP_GOAL, in_steps, at_most=True),
        "evaluating": {
            "gap_seconds": spread(evaluating["gaps"]),
            "gap_in_steps": statistics.median(evaluating["gaps"]) / statistics.median(evaluating["steps"]),
            "share_of_time": held_against(EVALUATION_GOAL, more / (steps * step), at_most=True),
        },
        "trainer_gap_against_ours": held_against(PEER_GAP_GOAL, less),
        "end_to_end": {
            "seconds": {"onward": ours["seconds"], "trainer": whole}, "extrapolated": peer_files < len(files),
            "peer_files": peer_files, "times_faster": held_against(END_TO_END_GOAL, faster),
        },
    }  # fmt: skip


def measure(rows: int = 100, files: int = 20, peer_files: int = 20, longest: int | None = None) -> dict[str, Any]:
    """Return gaps and end-to-end times on the 15M Llama; full training needs only a third of the files for the gap."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = small_llama(folder / "model")
        paths = [write_rows(folder / f"day-{n + 1}.jsonl", rows, skip=n * rows, longest=longest) for n in range(files)]
        counts = {"lora": (files, peer_files), "full": (max(files // 3, 2), max(peer_files // 2, 2))}
        found = {
            method: compare(folder, model, method, paths[:ours], min(ours, theirs), rows)
            for method, (ours, theirs) in counts.items()
        }
    return {"rows": rows, "longest_row": longest, **found}


def main() -> None:
    """Print the figures as JSON."""
    if sys.argv[1:2] == ["--onward"]:
        folder, model, method, share, *files = sys.argv[2:]
        paths = [Path(file) for file in files]
        print(json.dumps(train_onward(Path(folder), Path(model), method, paths, float(share))))
        return
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
