"""Everything that has to be seen on a GPU, in one call of eight minutes: `suite.py [--out DIR] [--tiny] [--only NAME
...]`.

Each check is a process of its own with a limit of its own; the most valuable come first, and results are written as
they come, so that a run that is cut short still tells something. While a check runs, the process of the next one
imports and waits for its turn without touching the GPU (`turns.py`). Nothing is downloaded. `--tiny` runs everything
with tiny shapes, on a CPU too: that is how the script itself is tested. `--render FILE` recreates the page, with the
remarks, which somebody has to write first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import record
from report import REMARKS, not_equal, render
from turns import Prepared

HERE = Path(__file__).parent
PAGE = HERE.parent / "RESULTS-GPU.md"
SECONDS, RESERVE, LEAST = 480.0, 15.0, 20.0
"""Seconds of the whole, reserved for its end, and the fewest with which a check is begun."""
FIRST, PATIENCE = 5, 60.0
"""Timed checks that are prepared together before the first: with the one after the quiet ones; and the seconds that an
import may take where nothing may import beside a check."""
MISSING = "ModuleNotFoundError: No module named '"


@dataclass(frozen=True, eq=False)
class Check:
    """One process.

    Args:
        name: its name in the results.
        words: the script of this folder, and its arguments.
        seconds: when to end it, from its turn.
        needs: a package without which it is not run.
        alone: whether no other check may run meanwhile, since it is timed.
        quiet: whether nothing may be prepared meanwhile either.
    """

    name: str
    words: tuple[str, ...]
    seconds: float = 60.0
    needs: str = ""
    alone: bool = True
    quiet: bool = False


def checks(tiny: bool) -> list[Check]:
    """Return all checks in their order: exactness, then the most telling of those that are timed."""
    small, least = ("tiny", "tiny") if tiny else ("small", "Qwen3-0.6B")
    middle, large = ("tiny", "tiny") if tiny else ("Qwen3-1.7B", "Llama-3.1-8B")
    exact = [
        Check(f"20 steps twice, {method}, {dtype}", ("exactness.py", "twice", small, method, dtype), 150, needs, False)
        for method, dtype, needs in (
            ("lora", "bfloat16", ""), ("full", "bfloat16", ""), ("qlora", "bfloat16", "bitsandbytes"),
            ("lora", "float32", ""), ("full", "float32", ""), ("anchored", "bfloat16", ""),
        )
    ]  # fmt: skip
    first, *speed = [
        Check(", ".join((side, shape, kinds, *more)), ("speed.py", side, shape, kinds, *more), 90, needs)
        for side, shape, kinds, more, needs in (
            ("onward", least, "packed,mixed,determinism", (), ""), ("trl", least, "packed,mixed", (), "trl"),
            ("onward", middle, "packed,mixed", (), ""), ("onward", large, "packed,mixed", (), ""),
            ("trl", middle, "packed,mixed", (), "trl"), ("trl", large, "packed", (), "trl"),
            ("onward", middle, "packed", ("full",), ""), ("trainer", least, "mixed", (), "datasets"),
        )
    ]  # fmt: skip
    beside = Check("gap, stall", ("journeys.py", "gap,stall", least), 90, quiet=True)
    resume = Check("resume", ("journeys.py", "resume", least), 90, quiet=True)
    room = [
        Check(f"{shape}, {method}, on {size} GiB", ("room.py", shape, method, size, *more), 60, needs)
        for shape, method, size, more, needs in (
            (large, "lora", "24", (), ""), (middle, "full", "24", ("adamw_8bit",), "bitsandbytes"),
        )
    ]  # fmt: skip
    ways = [
        Check(f"layers, {way}", ("layers.py", least, way), 145, "liger_kernel" if way == "liger" else "")
        for way in ("kernels", "liger", "norms", "layers")
    ]
    return [
        Check("files", ("exactness.py", "files", small), 200, "", False),
        Check("kills", ("exactness.py", "kills", small), 200, "", False), *exact,
        Check("failed recordings", ("failures.py",), 60, "", False),
        Check("machine", ("speed.py", "machine", least), 40),
        first, beside, resume, *speed[:5], *room, *speed[5:], *ways,
    ]  # fmt: skip


class Suite:
    """Checks that run until a deadline, and their processes, which are started before their turn.

    Args:
        out: folder for what is found; each check leaves a line on its outcome.
        reason: why no check can run, or nothing.
    """

    def __init__(self, out: Path, deadline: float, reason: str) -> None:
        self._out, self._deadline, self._reason = out, deadline, reason
        self._records = out / "results.jsonl"
        self._processes: dict[Check, Prepared] = {}
        self._writes = threading.Lock()

    def run(self, chosen: list[Check]) -> None:
        """Make those that are not timed in parallel, then each of the others alone.

        The first of those are prepared together before the first has its turn, so that nothing is imported beside them;
        later, the next one is prepared beside each that is not quiet.
        """
        timed = [check for check in chosen if check.alone]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as together:
            try:
                list(together.map(self._make, [check for check in chosen if not check.alone]))
            except BaseException:
                self.close()  # else the pool waits for what it runs
                raise
        self._prepare(timed[:FIRST])
        self._settle()
        for place, check in enumerate(timed):
            self._prepare([check] if check.quiet else timed[place : place + 2])
            if check.quiet:
                self._settle()
            self._make(check)

    def close(self) -> None:
        """End all processes."""
        for process in list(self._processes.values()):
            process.end()

    def _prepare(self, checks: list[Check]) -> None:
        for check in checks:
            if check not in self._processes and not self._obstacle(check):
                script, *words = check.words
                command = [sys.executable, "-W", "ignore", str(HERE / script), *words]
                self._processes[check] = Prepared(command, _environment(self._records, check.name), apart=True)

    def _settle(self) -> None:
        """Wait until no process imports."""
        for process in self._processes.values():
            process.wait_until_ready(PATIENCE)

    def _obstacle(self, check: Check) -> str:
        """Return why a check cannot be run now, or nothing."""
        return self._reason or _missing(check.needs) or ("no time left" if self._left() < LEAST else "")

    def _left(self) -> float:
        return self._deadline - time.monotonic() - RESERVE

    def _make(self, check: Check) -> None:
        """Let a check have its turn; its seconds count from there."""
        self._prepare([check])
        begun, why = time.monotonic(), self._obstacle(check)
        process = self._processes.get(check)
        if why or process is None:
            status = f"not run: {why}"
        else:
            status = self._outcome(check, process, min(check.seconds, self._left()))
        seconds = round(time.monotonic() - begun, 1)
        exact = {} if check.alone else {"exact": True}
        with self._writes:  # checks that run together end together: the page of one would mix with that of another
            record.append(self._records, {"check": check.name, "status": status, "seconds": seconds, **exact})
            print(f"{check.name}: {status} ({seconds} s)", file=sys.stderr, flush=True)
            (self._out / PAGE.name).write_text(render(record.read(self._records)), encoding="utf-8")

    def _outcome(self, check: Check, process: Prepared, seconds: float) -> str:
        status = process.take_turn(seconds)
        del self._processes[check]
        said = process.said()
        with self._writes, (self._out / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"== {check.name}\n{said[-8000:]}\n")
        if status is None:
            return f"not finished in {seconds:.0f} s"
        if status == 0:
            return "done"
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
        if MISSING in last:
            return f"not run: {last.partition(MISSING)[2].partition(chr(39))[0]} missing"
        return f"failed: {last[:300]}"


def _environment(records: Path, name: str) -> dict[str, str]:
    source = HERE.parents[1] / "src"
    path = os.pathsep.join(filter(None, (str(source), str(HERE), os.environ.get("PYTHONPATH", ""))))
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "ONWARD_GPU_CHECK": name}
    own["PYTHON_COLORS"] = "0"  # the last line of a traceback is read
    return {**os.environ, **own, record.RECORDS: str(records.absolute())}


def _has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@functools.cache
def _missing(package: str) -> str:
    if not package:
        return ""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return f"{package} missing" if done.returncode else ""


def main() -> None:
    """Run the checks and make the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "gpu", help="folder for what is found")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    parser.add_argument("--only", nargs="*", help="checks whose name has one of these words")
    parser.add_argument("--render", type=Path, help="make the page from a results.jsonl, with the remarks; run nothing")
    options = parser.parse_args()
    if options.render is not None:
        PAGE.write_text(render(record.read(options.render), remarks=REMARKS.read_text("utf-8")), encoding="utf-8")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", PAGE.name):
        (options.out / name).unlink(missing_ok=True)
    chosen = [
        check for check in checks(options.tiny) if not options.only or any(word in check.name for word in options.only)
    ]
    deadline = time.monotonic() + options.seconds
    reason = "" if options.tiny or _has_gpu() else "no GPU"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # like Ctrl-C: processes of checks end too
    try:
        with contextlib.closing(Suite(options.out, deadline, reason)) as suite:
            suite.run(chosen)
    finally:
        _publish(options.out, replaces=not options.tiny and not options.only)
    broken = not_equal(record.read(options.out / "results.jsonl"))
    if broken:
        sys.exit(f"not exact, or not shown to be: {', '.join(broken)}")


def _publish(out: Path, *, replaces: bool) -> None:
    """Print the page of what was found, and keep it if anything was seen: nothing else replaces an earlier one."""
    page = out / PAGE.name
    has_run = any("subject" in each for each in record.read(out / "results.jsonl"))
    if not page.exists():
        return
    if replaces and (has_run or not PAGE.exists()):
        PAGE.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
