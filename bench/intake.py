"""Intake: rows checked, hashed and tokenized per second, against the `tokenizers` library alone.

`python bench/intake.py [ROWS] [ROUNDS]`. Both sides tokenize the same texts on the same cores, in chunks of the same
size. The peer has them rendered and in memory, and writes nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import child, docstrings, held_against, interleaved, resident, spread

from onward.data.files.sources import read_rows
from onward.data.row_tokenizer import RowTokenizer
from onward.data.rows.records import parse_record
from onward.data.tokenize import CHUNK_ROWS, tokenize_file
from onward.data.tokenizer import TokenizerState
from onward.digest import sha256_file
from onward.training.model.base import resolve_base
from onward.training.model.load import load_tokenizer

GOAL = 0.8
FLAT = 1.1
"""The most that memory may grow, as a factor, for ten times the rows."""
MAX_LENGTH = 2048


def text_rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield docstrings as `text` rows, each a different one."""
    texts = docstrings()
    for number in range(count):
        yield {"text": f"{number}. {texts[number % len(texts)]}"}


def chat_rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield docstrings as chats of one and two turns."""
    texts = docstrings()
    for number in range(count):
        name, _, text = texts[number % len(texts)].partition("\n\n")
        first, _, rest = text.partition("\n\n")
        turns = [(f"{number}. What does {name} do?", first), ("Tell me more.", rest)]
        kept = [(question, answer) for question, answer in turns if answer.strip()]
        yield {"messages": [message for question, answer in kept for message in _turn(question, answer)]}


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def row_tokenizer() -> RowTokenizer:
    """Return the tokenizer of the default model."""
    tokenizer = load_tokenizer(resolve_base("smollm2-135m", report=lambda _: None))
    return RowTokenizer(TokenizerState.of(tokenizer), MAX_LENGTH)


def compare(folder: Path, rows: Path, rounds: int) -> dict[str, Any]:
    """Measure both sides on one file, in turns."""
    ours = row_tokenizer()
    prepared = [ours.prepare(parse_record(row.value)) for row in read_rows(rows)]
    texts = [[row.text for row in prepared[at : at + CHUNK_ROWS]] for at in range(0, len(prepared), CHUNK_ROWS)]
    special = not prepared[0].closed
    made = iter(range(1000))

    def seconds(side: str) -> float:
        begun = time.perf_counter()
        if side == "onward":
            report = tokenize_file(rows, folder / f"tokens-{rows.stem}-{next(made)}", sha256_file(rows), ours)
            assert report.ok
            assert report.rows == len(prepared)
        else:
            for chunk in texts:
                ours.state.tokenizer.encode_batch(chunk, add_special_tokens=special)
        return time.perf_counter() - begun

    interleaved(("onward", "tokenizers"), 1, seconds)  # threads and caches are warm for both
    found = interleaved(("onward", "tokenizers"), rounds, seconds)
    ratios = [alone / whole for whole, alone in zip(found["onward"], found["tokenizers"], strict=True)]
    megabytes = rows.stat().st_size / 1e6
    return {
        "rows": len(prepared),
        "megabytes": round(megabytes, 1),
        "seconds": {side: spread(values) for side, values in found.items()},
        "rows_per_second": {side: len(prepared) / statistics.median(values) for side, values in found.items()},
        "megabytes_per_second": {side: megabytes / statistics.median(values) for side, values in found.items()},
        "ratio": spread(ratios),
        "against_tokenizers": held_against(GOAL, statistics.median(ratios)),
    }


def peak(rows: Path) -> dict[str, int]:
    """Run as a process that takes in one file: return the resident bytes before, and the peak meanwhile."""
    tokenizer = row_tokenizer()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        assert tokenize_file(rows, Path(folder) / "tokens", sha256_file(rows), tokenizer).ok
    return {"before": before, "peak": resident("VmHWM")}


def measure(rows: int = 10_000, rounds: int = 5) -> dict[str, Any]:
    """Return speed on text and chat rows, and the peak of memory for `rows` and ten times as many."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {
            "text": write(folder / "text.jsonl", text_rows(rows)),
            "chat": write(folder / "chat.jsonl", chat_rows(rows)),
        }
        speed = {name: compare(folder, path, rounds) for name, path in files.items()}
        more = write(folder / "more.jsonl", chat_rows(10 * rows))
        memory = {rows: child(Path(__file__), "--peak", files["chat"])}
        memory[10 * rows] = child(Path(__file__), "--peak", more)
    ratio = memory[10 * rows]["peak"] / memory[rows]["peak"]
    return {**speed, "memory": {"bytes": memory, "growth": held_against(FLAT, ratio, at_most=True)}}


def main() -> None:
    """Print the figures as JSON."""
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps(peak(Path(sys.argv[2]))))
        return
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
