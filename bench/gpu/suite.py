"""Everything that has to be seen on a GPU, in one call of eight minutes: `suite.py [--out DIR] [--tiny] [--only NAME
...]`.

Each check is a process of its own with a limit of its own; the most valuable come first, and results are written as
they come, so that a run that is cut short still tells something. Nothing is downloaded. `--tiny` runs everything with
tiny shapes, on a CPU too: that is how the script itself is tested. `--render FILE` recreates the page.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import record
from report import render

HERE = Path(__file__).parent
PAGE = HERE.parent / "RESULTS-GPU.md"
SECONDS, RESERVE, LEAST = 480.0, 15.0, 20.0
"""Seconds of the whole, reserved for its end, and the fewest with which a check is begun."""
MISSING = "ModuleNotFoundError: No module named '"


@dataclass(frozen=True)
class Check:
    """One process.

    Args:
        name: its name in the results.
        words: the script of this folder, and its arguments.
        seconds: when to end it.
        needs: a package without which it is not run.
        alone: whether nothing else may run meanwhile, since it is timed.
    """

    name: str
    words: tuple[str, ...]
    seconds: float = 60.0
    needs: str = ""
    alone: bool = True


def checks(tiny: bool) -> list[Check]:
    """Return all checks, the most telling first."""
    small, least = ("tiny", "tiny") if tiny else ("small", "Qwen3-0.6B")
    middle, large = ("tiny", "tiny") if tiny else ("Qwen3-1.7B", "Llama-3.1-8B")
    exact = [
        Check(f"20 steps twice, {method}, {dtype}", ("exactness.py", "twice", small, method, dtype), 150, needs, False)
        for method, dtype, needs in (
            ("lora", "bfloat16", ""), ("full", "bfloat16", ""), ("qlora", "bfloat16", "bitsandbytes"),
            ("lora", "float32", ""), ("full", "float32", ""),
        )
    ]  # fmt: skip
    speed = [
        Check(", ".join((side, shape, kinds, *more)), ("speed.py", side, shape, kinds, *more), 90, needs)
        for side, shape, kinds, more, needs in (
            ("onward", least, "packed,mixed,determinism", (), ""), ("trl", least, "packed,mixed", (), "trl"),
            ("onward", large, "packed,mixed", (), ""), ("onward", middle, "packed,mixed", (), ""),
            ("trl", middle, "packed,mixed", (), "trl"), ("trl", large, "packed", (), "trl"),
            ("onward", middle, "packed", ("full",), ""), ("trainer", least, "mixed", (), "datasets"),
        )
    ]  # fmt: skip
    beside = Check("gap, stall", ("journeys.py", "gap,stall", least), 90)
    resume = Check("resume", ("journeys.py", "resume", least), 90)
    ways = [
        Check(f"layers, {way}", ("layers.py", least, way), 145, "liger_kernel" if way == "liger" else "")
        for way in ("kernels", "liger", "norms", "layers")
    ]
    return [
        *exact, Check("files", ("exactness.py", "files", small), 150, "", False),
        Check("kills", ("exactness.py", "kills", small), 150, "", False), Check("machine", ("speed.py", "machine"), 40),
        *speed[:4], beside, resume, *ways[:2], *speed[4:], *ways[2:],
    ]  # fmt: skip


def run(chosen: list[Check], out: Path, deadline: float, *, any_device: bool) -> None:
    """Run checks until the deadline, in parallel if none is timed; each leaves a line on its outcome."""
    records, log = out / "results.jsonl", out / "log.txt"
    reason = "" if any_device or _has_gpu() else "no GPU"

    def make(check: Check) -> None:
        left = deadline - time.monotonic() - RESERVE
        why = reason or _missing(check.needs) or ("no time left" if left < LEAST else "")
        begun = time.monotonic()
        status = f"not run: {why}" if why else _make(check, min(check.seconds, left), records, log)
        seconds = round(time.monotonic() - begun, 1)
        record.append(records, {"check": check.name, "status": status, "seconds": seconds})
        print(f"{check.name}: {status} ({seconds} s)", file=sys.stderr, flush=True)
        (out / PAGE.name).write_text(render(record.read(records)), encoding="utf-8")

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as together:
        list(together.map(make, [check for check in chosen if not check.alone]))
    for check in chosen:
        if check.alone:
            make(check)


def _make(check: Check, seconds: float, records: Path, log: Path) -> str:
    script, *words = check.words
    command = [sys.executable, "-W", "ignore", str(HERE / script), *words]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=_environment(records, check.name), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            status = None
        output.seek(0)
        said = output.read().decode(errors="replace")
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"== {check.name}\n{said[-8000:]}\n")
    if status is None:
        return f"not finished in {seconds:.0f} s"
    if status == 0:
        return "done"
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    if MISSING in last:
        return f"not run: {last.partition(MISSING)[2].partition(chr(39))[0]} missing"
    return f"failed: {last[:300]}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _environment(records: Path, name: str) -> dict[str, str]:
    source = HERE.parents[1] / "src"
    path = os.pathsep.join(filter(None, (str(source), str(HERE), os.environ.get("PYTHONPATH", ""))))
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "ONWARD_GPU_CHECK": name}
    return {**os.environ, **own, record.RECORDS: str(records.absolute())}


def _has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


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
    parser.add_argument("--render", type=Path, help="make the page from a results.jsonl, and run nothing")
    options = parser.parse_args()
    if options.render is not None:
        PAGE.write_text(render(record.read(options.render)), encoding="utf-8")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.jsonl").unlink(missing_ok=True)
    chosen = [
        check for check in checks(options.tiny) if not options.only or any(word in check.name for word in options.only)
    ]
    run(chosen, options.out, time.monotonic() + options.seconds, any_device=options.tiny)
    has_run = any("subject" in each for each in record.read(options.out / "results.jsonl"))
    if not options.tiny and not options.only and (has_run or not PAGE.exists()):  # nothing replaces what was seen
        PAGE.write_text((options.out / PAGE.name).read_text(encoding="utf-8"), encoding="utf-8")
    print((options.out / PAGE.name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
