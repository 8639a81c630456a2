"""Growth: the cost of a file after ten files and after a thousand, in one process on a tiny model.

`python bench/growth.py [FILES]`. Seconds per file and resident memory early against late, the size of
`trainer_state.json`, and the time of `status` and `history` at the end.
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

from material import write_base
from measuring import child, docstrings, held_against, resident, spread, tune_process

TIME_GOAL, MEMORY_GOAL = 1.1, 1.05
ROWS = 8


def write_files(folder: Path, count: int) -> list[Path]:
    """Write small files, each row with a text of its own."""
    folder.mkdir()
    texts, paths = docstrings(), []
    for number in range(count):
        at = number * ROWS
        lines = [json.dumps({"text": f"{at + i}. {texts[(at + i) % len(texts)][:100]}"}) for i in range(ROWS)]
        paths.append(folder / f"day-{number + 1:04}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def train(folder: Path, count: int) -> dict[str, Any]:
    """Run as the process that trains: return the time of each boundary, and memory and size of the state there."""
    import torch

    from onward import Run
    from onward.events import FileDone

    torch.set_num_threads(1)
    base, files = write_base(folder / "base"), write_files(folder / "files", count)
    run = Run.create(folder / "run", str(base), batch_size=ROWS, lora={"rank": 4, "alpha": 8, "dropout": 0.0})
    times: list[float] = []
    memory: list[int] = []
    sizes: list[int] = []

    def observe(event: object) -> None:
        if isinstance(event, FileDone):
            times.append(time.perf_counter())
            memory.append(resident())
            sizes.append((run.layout.current / "trainer_state.json").stat().st_size)

    tune_process()
    run.train(*files, observe=observe)
    assert len(times) == count
    queries = {name: [_seconds(query) for _ in range(5)] for name, query in _queries(run).items()}
    return {"times": times, "memory": memory, "sizes": sizes, "queries": queries, "ledger": _ledger_size(run)}


def _queries(run: Any) -> dict[str, Any]:
    return {"status": run.status, "history": run.history}


def _seconds(query: Any) -> float:
    begun = time.perf_counter()
    query()
    return time.perf_counter() - begun


def _ledger_size(run: Any) -> int:
    return run.layout.ledger.stat().st_size


def measure(files: int = 1000) -> dict[str, Any]:
    """Return the cost of late files against early ones. With fewer files, the windows shrink too."""
    with tempfile.TemporaryDirectory() as scratch:
        found = child(Path(__file__), "--train", scratch, files)
    seconds = [after - before for before, after in pairwise(found["times"])]
    window = max(files // 10, 1)
    skip = max(files // 100, 1)
    early, late = seconds[skip : skip + window], seconds[-window:]
    memory_early, memory_late = found["memory"][window : 2 * window], found["memory"][-window:]
    slower = statistics.median(late) / statistics.median(early)
    larger = statistics.median(memory_late) / statistics.median(memory_early)
    return {
        "files": files,
        "rows": ROWS,
        "seconds_per_file": {
            "early": spread(early), "late": spread(late), "growth": held_against(TIME_GOAL, slower, at_most=True),
        },
        "resident_bytes": {
            "early": spread(memory_early), "late": spread(memory_late),
            "growth": held_against(MEMORY_GOAL, larger, at_most=True),
        },
        "trainer_state_bytes": {"early": found["sizes"][skip], "late": found["sizes"][-1]},
        "ledger_bytes": found["ledger"],
        "query_seconds": {name: spread(values) for name, values in found["queries"].items()},
    }  # fmt: skip


def main() -> None:
    """Print the figures as JSON."""
    if sys.argv[1:2] == ["--train"]:
        print(json.dumps(train(Path(sys.argv[2]), int(sys.argv[3]))))
        return
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
