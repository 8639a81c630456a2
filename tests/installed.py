"""Try the Onward that is installed, as a new user would: `python -P tests/installed.py`.

A tiny random model is trained on two files in two processes, verified, looked at and asked for its figures. The working
directory and the checkout are not imported from: only this file's folder is, for the model.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import tiny


def main() -> int:
    """Run the commands; returns 0, or 1 with the first that failed."""
    command = Path(sys.executable).with_name("onward")
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.save_tiny_model(Path(folder) / "model")
        run = Path(folder) / "run"
        files = [tiny.write_jsonl(Path(folder) / f"{seed}.jsonl", tiny.chat_rows(8, seed)) for seed in range(2)]
        for words in (
            ["--version"],
            ["init", run, "--model", model, "--set", "lora.rank=2"],
            ["train", files[0], "--run", run],
            ["train", files[1], "--run", run],
            ["verify", "--deep", "--run", run],
            ["history", "--run", run],
            ["metrics", "--run", run],
            ["doctor", "--run", run],
        ):
            done = subprocess.run([command, *words], cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                print(f"onward {' '.join(map(str, words))}: exit status {done.returncode}\n{done.stderr}")
                return 1
    version = importlib.metadata.version("onward")
    print(f"onward {version} works as it is installed, on Python {sys.version.split()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
