"""What the measuring scripts share: models and rows to measure with, processes of their own, medians."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import Any

MODULES = (
    "argparse", "ast", "asyncio", "bisect", "calendar", "codecs", "collections", "csv", "datetime", "decimal",
    "difflib", "email.message", "fractions", "functools", "gzip", "heapq", "http.client", "inspect", "io", "itertools",
    "json", "logging", "math", "multiprocessing", "os", "pathlib", "pickle", "random", "re", "shutil", "socket",
    "sqlite3", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "turtle", "typing",
    "unittest.mock", "urllib.request", "xml.etree.ElementTree", "zipfile",
)  # fmt: skip


def docstrings() -> list[str]:
    """Return documentation of the standard library, from a line to a few pages each, in a fixed shuffled order."""
    texts: dict[str, None] = {}
    for name in MODULES:
        for path, thing in _public(name):
            text = getdoc(thing)
            if text and len(text) >= 20:
                texts.setdefault(f"{path}\n\n{text}")
    rows = list(texts)
    random.Random(0).shuffle(rows)
    return rows


def _public(module: str) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(vars(import_module(module)).items()):
        if name.startswith("_"):
            continue
        yield f"{module}.{name}", value
        if isinstance(value, type):
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_") and callable(function):
                    yield f"{module}.{name}.{method}", function


def write_rows(path: Path, count: int, *, skip: int = 0, longest: int | None = None) -> Path:
    """Write `count` docstrings, of at most `longest` characters, as `text` rows, starting over at their end."""
    texts = [text for text in docstrings() if longest is None or len(text) <= longest]
    rows = [json.dumps({"text": texts[(skip + i) % len(texts)]}) for i in range(count)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def mixed_rows(path: Path, data: Path | None, count: int) -> Path:
    """Write rows of mixed length: docstrings, mixed with real rows of `data` if given."""
    rows = [json.dumps({"text": text}) for text in docstrings()[:count]]
    if data is not None:
        others = [file.read_text(encoding="utf-8").splitlines()[: count // 4] for file in sorted(data.glob("*.jsonl"))]
        rows = [*rows, *(row for lines in others for row in lines)]
        random.Random(1).shuffle(rows)
    path.write_text("\n".join(rows[:count]) + "\n", encoding="utf-8")
    return path


def small_llama(folder: Path) -> Path:
    """Write a random Llama of 15 million parameters with the tokenizer of the default model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from onward.training.model.base import resolve_base

    tokenizer = AutoTokenizer.from_pretrained(resolve_base("smollm2-135m", report=lambda _: None))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768, num_hidden_layers=9,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def child(script: Path, *arguments: object) -> Any:
    """Run a script in a process of its own and return the JSON on the last line of its output.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    command = python(script, *arguments)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{script.name} {' '.join(map(str, arguments))}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def python(*words: object) -> list[str]:
    """Return the command that runs this interpreter on `words`."""
    return [sys.executable, "-W", "ignore", *map(str, words)]


def environment() -> dict[str, str]:
    """Return the environment of a process that measures; no side waits for its threads in a busy loop.

    Every side finds its modules compiled from its second process on, like those of an installed package.
    """
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {"GOMP_SPINCOUNT": "1000", **given, **own}


def tune_process() -> None:
    """Apply the settings that the command line applies to its own process; the library applies none."""
    from onward import startup

    startup.set_environment()
    startup.keep_freed_memory()


def seconds_until(command: Sequence[str], line: str) -> float:
    """Return the seconds from the start of a process to the first line of its stderr that begins with `line`; end it
    there.

    Raises:
        RuntimeError: it ended before that; the message has the end of its output.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    assert process.stderr is not None
    with process:
        for text in process.stderr:
            if text.startswith(line):
                seconds = time.perf_counter() - begun
                process.kill()
                return seconds
            said.append(text)
    raise RuntimeError(f"{' '.join(command)}:\n{''.join(said)[-2000:]}")


def interleaved(sides: Sequence[str], rounds: int, measure: Callable[[str], Any]) -> dict[str, list[Any]]:
    """Measure every side once per round, so that a machine that slows down slows all of them."""
    found: dict[str, list[Any]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side].append(measure(side))
    return found


def held_against(goal: float, value: float, *, at_most: bool = False) -> dict[str, Any]:
    """Return a figure with its goal, and whether it is met."""
    return {"value": value, "goal": goal, "at_most": at_most, "met": value <= goal if at_most else value >= goal}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def resident(field: str = "VmRSS") -> int:
    """Return the resident bytes of this process now, or their peak so far (`VmHWM`); Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Reset `VmHWM` to the current resident bytes; Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Return the facts that the figures depend on."""
    import torch

    import onward

    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "tokenizers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": _processor(), "cores": os.cpu_count(), "device": device, "system": platform.platform(),
        "python": platform.python_version(), "onward": onward.__version__, **versions,
    }  # fmt: skip


def version(package: str) -> str:
    """Return the version of an installed package, or say that it is missing."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
