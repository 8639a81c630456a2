"""The whole suite, as `make bench` runs it: every measurement in turn, and `RESULTS.md` from what was measured.

`python bench/suite.py [--data FOLDER] [--only NAME ...] [--render]`. What is measured is kept as JSON in `bench/out/`;
with `--only` the other figures come from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring

HERE = Path(__file__).parent
OUT, RESULTS, REMARKS = HERE / "out", HERE / "RESULTS.md", HERE / "REMARKS.md"
SPREAD = {"median", "min", "max"}
AGAINST = {"value", "goal", "at_most", "met"}


def throughput(model: Path | None, *, steps: int, rounds: int) -> Callable[[Path, Path | None], Any]:
    """Return a function that measures the throughput of a model; None is the random one of 15M parameters."""

    def measure(work: Path, data: Path | None) -> Any:
        from throughput import measure as measure_throughput

        from onward.training.model.base import resolve_base

        folder = measuring.small_llama(work / "model") if model is None else resolve_base(str(model))
        rows = measuring.mixed_rows(work / "rows.jsonl", data, steps * 8)
        return measure_throughput(folder, rows, steps=steps, rounds=rounds)

    return measure


def stall(work: Path, _data: Path | None) -> Any:
    """Measure what checkpoints cost."""
    from stall import measure

    return measure(work)


def script(name: str, *arguments: int) -> Callable[[Path, Path | None], Any]:
    """Return a function that runs a script of this folder, which prints its figures as JSON."""

    def measure(_work: Path, _data: Path | None) -> Any:
        import subprocess

        command = measuring.python(HERE / f"{name}.py", *arguments)
        done = subprocess.run(command, env=measuring.environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout)

    return measure


MEASUREMENTS: dict[str, tuple[str, Callable[[Path, Path | None], Any]]] = {
    "throughput-15m": ("Training throughput, random Llama of 15M parameters", throughput(None, steps=12, rounds=1)),
    "throughput-135m": (
        "Training throughput, smollm2-135m",
        throughput(Path("smollm2-135m"), steps=6, rounds=1),
    ),
    "boundary": ("Boundaries between files", script("boundary", 100, 20, 4)),
    "stall": ("Checkpoints behind training", stall),
    "resume": ("Resume", script("resume")),
    "intake": ("Intake", script("intake", 5_000, 3)),
    "growth": ("Growth", script("growth", 1_000)),
    "start": ("Start", script("start", 3)),
}


def run(names: list[str], data: Path | None) -> None:
    """Measure, and keep each result as soon as it is available."""
    OUT.mkdir(exist_ok=True)
    for name in names:
        title, measure = MEASUREMENTS[name]
        print(f"{title} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            figures = measure(Path(work), data)
        took = time.monotonic() - begun
        kept = {"machine": measuring.machine(), "data": data is not None, "seconds": took, "figures": figures}
        (OUT / f"{name}.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        print(f"  {took:.0f} s", file=sys.stderr, flush=True)


def render() -> str:
    """Return `RESULTS.md` from the results in `bench/out/`."""
    kept = {name: json.loads((OUT / f"{name}.json").read_text()) for name in MEASUREMENTS if _has(name)}
    machines = {json.dumps(entry["machine"], sort_keys=True) for entry in kept.values()}
    lines = ["# Results", "", "Written by `make bench`. Figures are medians, with the least and the greatest.", ""]
    for text in sorted(machines):
        lines += [", ".join(f"{key} {value}" for key, value in json.loads(text).items()) + ".", ""]
    lines += ["## Goals", "", "| | measured | goal | met |", "|---|---|---|---|"]
    for name, entry in kept.items():
        for path, against in goals(entry["figures"]):
            lines.append(f"| {name}: {path} | {_number(against['value'])} | {_goal(against)} | {_met(against)} |")
    lines += ["", REMARKS.read_text(encoding="utf-8").strip(), ""]
    for name, entry in kept.items():
        rows = "with" if entry["data"] else "without"
        lines += [f"## {MEASUREMENTS[name][0]}", "", f"{entry['seconds']:.0f} s, {rows} rows of other domains.", ""]
        lines += ["| | median | min | max |", "|---|---|---|---|"]
        lines += [f"| {path} | {values} |" for path, values in figures(entry["figures"])]
        lines.append("")
    return "\n".join(lines)


def _has(name: str) -> bool:
    return (OUT / f"{name}.json").is_file()


def goals(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every figure that has a goal, with its path."""
    if isinstance(value, dict):
        if set(value) >= AGAINST:
            yield path, value
            return
        for key, inner in value.items():
            yield from goals(inner, f"{path}, {_words(key)}" if path else _words(key))


def figures(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every other figure as cells of a table."""
    if isinstance(value, dict):
        if set(value) == SPREAD:
            yield path, " | ".join(_number(value[key]) for key in ("median", "min", "max"))
        elif not set(value) >= AGAINST:
            for key, inner in value.items():
                yield from figures(inner, f"{path}, {_words(key)}" if path else _words(key))
    elif value is not None and value != [] and not isinstance(value, list):
        yield path, f"{_number(value)} | |"


def _words(key: str) -> str:
    return str(key).replace("_", " ")


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _goal(against: dict[str, Any]) -> str:
    return f"{'at most' if against['at_most'] else 'at least'} {against['goal']:g}"


def _met(against: dict[str, Any]) -> str:
    return "yes" if against["met"] else "**no**"


def main() -> None:
    """Run the suite and write `RESULTS.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with rows of other domains (*.jsonl), mixed in")
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--render", action="store_true", help="measure nothing: write RESULTS.md from bench/out/")
    arguments = parser.parse_args()
    if not arguments.render:
        run(arguments.only, arguments.data)
    RESULTS.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
