"""Training rows and files, good and bad, that the page of training files shows."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Sequence
from typing import Any

USER = {"role": "user", "content": "What does HTTP status 404 mean?"}
ANSWER = {"role": "assistant", "content": "Not Found."}
EXAMPLES: Sequence[tuple[str, str, dict[str, Any]]] = (
    ("`messages`", "Chat of OpenAI and TRL.", {"messages": [USER, ANSWER]}),
    (
        "`conversations`",
        "ShareGPT.",
        {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ANSWER["content"]}]},
    ),
    (
        "`prompt` and `completion`",
        "Two strings, laid end to end without a template. Two lists of messages are a chat, of which only the answers "
        "in the completion are trained.",
        {"prompt": "HTTP status 404 means: ", "completion": "Not Found."},
    ),
    (
        "`instruction`, `input` and `output`",
        "Alpaca. The question is `instruction`, a blank line and `input` (which may be absent or empty); `history` is "
        "a list of earlier pairs of question and answer. The row is a chat.",
        {"instruction": "Say what this HTTP status means.", "input": "404", "output": "Not Found."},
    ),
    ("`text`", "Plain text.", {"text": "HTTP status 404 means: Not Found."}),
)
"""Name, what it is, and a row that `parse_record` accepts, in the order in which a row's keys are looked at."""

REFUSED_ROWS: Sequence[Any] = (
    "a string",
    {"code": 404, "meaning": "Not Found."},
    {"prompt": "404?"},
    {"messages": []},
    {"messages": [USER]},
    {"messages": [USER, {"role": "assistant", "content": " "}]},
    {"messages": [USER, {"role": "narrator", "content": "Not Found."}]},
    {"messages": [USER, {"role": "assistant", "content": 404}]},
    {"conversations": [{"from": "me", "value": "404?"}]},
    {"prompt": "404?", "completion": ""},
    {"text": ""},
    {"text": "\ud800"},
    {"prompt": "404?", "chosen": "Not Found.", "rejected": "Found."},
    {"prompt": "404?", "completions": ["Not Found.", "Found."], "labels": [True, False]},
    {"prompt": "404?", "completion": "Found.", "label": False},
    {"messages": [USER, ANSWER], "images": ["404.png"]},
    {"input_ids": [404]},
    {"messages": [USER, {**ANSWER, "weight": -1}]},
)


def _zip(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b'{"text": "a"}\n')
    return stream.getvalue()


REFUSED_FILES: Sequence[tuple[str, str, bytes]] = (
    ("another ending", "rows.xlsx", b"a,b\n"),
    ("a compression alone", "rows.gz", gzip.compress(b"a\n")),
    ("JSON in a text", "rows.txt", b'{"text": "a"}\n'),
    ("a zip of several files", "rows.zip", _zip("a.jsonl", "b.jsonl")),
    ("zip without its ending", "rows.jsonl", _zip("a.jsonl")),
    ("a row of too many fields", "rows.csv", b"text\na,b\n"),
    ("a quote with a backslash", "rows.csv", b'text\n"say \\"a\\""\n'),
    ("commas in a .tsv", "rows.tsv", b"prompt,completion\na,b\n"),
    ("UTF-16", "rows.jsonl", '{"text": "a"}\n'.encode("utf-16")),
    ("line ends of old Macs", "rows.txt", b"one\rtwo\r"),
    ("an array in a .jsonl", "rows.jsonl", b'[\n{"text": "a"}\n]\n'),
    ("a key twice", "rows.jsonl", b'{"text": "a", "text": "b"}\n'),
    ("another kind of document", "rows.txt", b"%PDF-1.7\n"),
    ("a pointer of Git LFS", "rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n"),
    ("gzip without its ending", "rows.jsonl", gzip.compress(b'{"text": "a"}\n')),
    ("an ending without gzip", "rows.jsonl.gz", b'{"text": "a"}\n'),
    ("gzip that is cut off", "rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-9]),
    ("a byte that is not UTF-8", "rows.jsonl", b'{"text": "caf\xe9"}\n'),
    ("a line that is not JSON", "rows.jsonl", b"text: a\n"),
    ("a .json file that is cut off", "rows.json", b'[{"text": "a"},'),
)
