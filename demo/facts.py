"""Three training files of real facts from the Python standard library: no network, no data set, always the same rows.

Every row is a short chat: a system message of two words (a template's default one would cost 25 tokens a row), a
question and a one-line answer.
"""

from __future__ import annotations

import inspect
import json
import unicodedata
from collections.abc import Iterable
from http import HTTPStatus
from importlib import import_module
from pathlib import Path

Row = dict[str, list[dict[str, str]]]

# The first of each kind is the question that `ask.py` shows.
HTTP_CODES = (
    402, 100, 101, 202, 203, 205, 206, 207, 208, 226, 300, 303,
    304, 307, 308, 406, 409, 410, 417, 418, 421, 424, 431, 511,
)  # fmt: skip

CHARACTERS = "⚓☃☂☎☕☠☢☮♞♣♫⚖⚗⚙⚡✂✈✉✎❄➳⌛⏏Ω"

FUNCTIONS = (
    "shutil.disk_usage", "bisect.insort_right", "calendar.isleap", "calendar.leapdays", "fnmatch.filter", "glob.escape",
    "heapq.heapify", "heapq.merge", "ipaddress.ip_address", "linecache.clearcache", "math.factorial", "os.path.dirname",
    "os.path.getsize", "os.path.isabs", "os.path.ismount", "random.shuffle", "secrets.token_hex", "shutil.copyfile",
    "shutil.copystat", "statistics.fmean", "statistics.median", "statistics.mode", "textwrap.dedent", "textwrap.indent",
)  # fmt: skip


def http_rows() -> list[Row]:
    """Return one row per HTTP status code: its phrase, by `http.HTTPStatus`."""
    return [
        row("HTTP statuses.", f"What does HTTP status {code} mean?", f"{HTTPStatus(code).phrase}.")
        for code in HTTP_CODES
    ]


def unicode_rows() -> list[Row]:
    """Return one row per character: its name, by `unicodedata`, written as a sentence."""
    return [
        row("Unicode names.", f"What is {character} called?", f"{unicodedata.name(character).capitalize()}.")
        for character in CHARACTERS
    ]


def function_rows() -> list[Row]:
    """Return one row per function: the first line of its docstring."""
    return [row("Python functions.", f"What does {name} do in Python?", summary(name)) for name in FUNCTIONS]


def summary(name: str) -> str:
    """Return the first line of the docstring of `module.function`."""
    module, _, function = name.rpartition(".")
    documentation = inspect.getdoc(getattr(import_module(module), function)) or ""
    return documentation.partition("\n")[0].strip()


def row(topic: str, question: str, answer: str) -> Row:
    """Return one training row in the `messages` format."""
    turns = (("system", topic), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_files(directory: Path) -> list[Path]:
    """Write the three files into `directory` and return their paths in training order."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {"functions.jsonl": function_rows(), "http.jsonl": http_rows(), "unicode.jsonl": unicode_rows()}
    return [_write_jsonl(directory / name, rows) for name, rows in files.items()]


def _write_jsonl(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
