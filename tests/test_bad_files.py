"""Bad files, against the command line: refused whole, row and remedy named, and the run left as it was."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import zstandard
from commands import assert_refused, make_run, onward

GOOD = b'{"prompt": "one", "completion": "two"}\n'


SHAPES = 'write each row as {"messages": [...]}'


def lines(*rows: Any) -> bytes:
    """Return rows as JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def chat(*turns: tuple[str, Any]) -> bytes:
    """Return one row of `messages` from roles and contents."""
    return lines({"messages": [{"role": role, "content": content} for role, content in turns]})


BAD_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # name: content, and what stderr says: the place, the reason, the remedy
    "empty.jsonl": (b"", ("empty.jsonl: the file has no rows", "write at least one row")),
    "empty.jsonl.gz": (b"", ("empty.jsonl.gz: the file has no rows", "write at least one row")),
    "space.jsonl": (b" \n\n\t\r\n", ("space.jsonl: the file has no rows", "write at least one row")),
    "no-rows.json": (b"[]", ("no-rows.json: the file has no rows", "write at least one row")),
    "prose.jsonl": (GOOD + b"hello\n", ("prose.jsonl, line 2: not valid JSON", "write one JSON object per line")),
    "cut.jsonl": (GOOD + GOOD[:20], ("cut.jsonl, line 2: not valid JSON", "write one JSON object per line")),
    "array.json": (b'[{"prompt": "a", "completion": "b"}, {"pro', ("array.json, row 2: not valid JSON", "repair")),
    "scalar.json": (b'"text"', ("scalar.json, row 1: not valid JSON", "repair the file")),
    "latin-1.jsonl": (
        GOOD + '{"text": "é"}\n'.encode("latin-1"),
        ("latin-1.jsonl, line 2: byte 0xe9 is not UTF-8", "export the file again as UTF-8"),
    ),
    "utf-16.jsonl": (
        GOOD.decode().encode("utf-16"),
        ("utf-16.jsonl, line 1: the text is UTF-16, not UTF-8", "iconv -f UTF-16"),
    ),
    "binary.jsonl": (bytes(range(256)) * 8, ("binary.jsonl, line 1: the content is not text", "write it as text")),
    "late-nul.jsonl": (GOOD * 20 + b'{"text": "\x00"}\n', ("late-nul.jsonl, line 21: it contains zero bytes",)),
    "list.jsonl": (GOOD + b"[1, 2]\n", ("list.jsonl, line 2: the row is a list, not an object", SHAPES)),
    "number.jsonl": (GOOD + b"42\n", ("number.jsonl, line 2: the row is a number, not an object", SHAPES)),
    "null.jsonl": (b"null\n", ("null.jsonl, line 1: the row is null, not an object", SHAPES)),
    "keys.jsonl": (lines({"question": "a"}), ("keys.jsonl, line 1: no known row format", '"question"', SHAPES)),
    "half-a-key.jsonl": (b'{"\\ud800": 1}\n', ("half-a-key.jsonl, line 1: no known row format", "\\ud800", SHAPES)),
    "escape-key.jsonl": (b'{"a\\nb\\u001b[31m": 1}\n', ("line 1: no known row format", '"a\\nb\\x1b[31m"', SHAPES)),
    "prompt.jsonl": (lines({"prompt": "a"}), ('line 1: the row has "prompt" but no "completion"', 'add "completion"')),
    "no-answer.jsonl": (
        lines({"prompt": "a", "completion": ""}),
        ("no-answer.jsonl, line 1: completion is empty", "or remove the row"),
    ),
    "blank.jsonl": (
        chat(("user", "a"), ("assistant", " \n")),
        ("blank.jsonl, line 1: the answer in message 2 is empty", "write what the model should answer"),
    ),
    "unanswered.jsonl": (
        chat(("user", "a")),
        ("unanswered.jsonl, line 1: the chat has no assistant turn", "add the assistant's answer"),
    ),
    "user-last.jsonl": (
        chat(("user", "a"), ("assistant", "b"), ("user", "c")),
        ("user-last.jsonl, line 1: the last message is the user's", "end the chat with an assistant message"),
    ),
    "role.jsonl": (
        chat(("wizard", "a"), ("assistant", "b")),
        ("role.jsonl, line 1: message 1 has the unknown role 'wizard'", "use one of system"),
    ),
    "endless-role.jsonl": (chat(("w" * 1_000_000, "a")), ("line 1: message 1 has the unknown role", "www...")),
    "content.jsonl": (
        chat(("user", 5), ("assistant", "b")),
        ("content.jsonl, line 1: the content of message 1 is a number", "write the content as a string"),
    ),
    "messages.jsonl": (
        lines({"messages": "hi"}),
        ('messages.jsonl, line 1: "messages" is a string, not a list', "as a list of messages"),
    ),
    "no-messages.jsonl": (lines({"messages": []}), ('no-messages.jsonl, line 1: "messages" is empty', "add at least")),
    "bare-messages.jsonl": (lines({"messages": ["a"]}), ("line 1:", "write each message as an object")),
    "sharegpt.jsonl": (
        lines({"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ("sharegpt.jsonl, line 1: unknown \"from\": 'alien'", "use one of system"),
    ),
    "surrogate.jsonl": (
        b'{"prompt": "a", "completion": "\\ud800"}\n',
        ("surrogate.jsonl, line 1: completion contains half of a surrogate pair", "export the file again"),
    ),
    "deep.jsonl": (
        GOOD + b'{"text": ' + b"[" * 100_000 + b"\n",
        ("deep.jsonl, line 2: the JSON is nested too deeply", "flatten the row"),
    ),
    "deep.json": (b"[" * 100_000, ("deep.json, row 1: the JSON is nested too deeply", "flatten the row")),
    "digits.jsonl": (b'{"n": ' + b"9" * 5000 + b"}\n", ("line 1: not usable JSON", "write the number as a string")),
    "endless-line.jsonl.gz": (
        gzip.compress(b'{"text": "' + b"a" * (65 << 20), 1),
        ("endless-line.jsonl.gz, line 1: the line is larger than 16 MiB", "raise max_row_mb"),
    ),
    "utf-16.jsonl.gz": (
        gzip.compress(GOOD.decode().encode("utf-16")),
        ("the text is UTF-16, not UTF-8", "gzip -dc utf-16.jsonl.gz | iconv -f UTF-16 -t UTF-8 > new-file"),
    ),
    "mac.jsonl.xz": (
        lzma.compress(GOOD.strip() + b"\r" + GOOD.strip() + b"\r"),
        ("its lines end in a carriage return only", "xz -dc mac.jsonl.xz | tr '\\r' '\\n' > new-file"),
    ),
    "nul.jsonl.zst": (zstandard.compress(b'{"a": "\x00b"}\n'), ("zero bytes", "zstd -dc nul.jsonl.zst | tr")),
    "twice.jsonl.gz": (
        gzip.compress(gzip.compress(GOOD)),
        ("it is packed twice: what it contains is gz", "unpack it once: gzip -dc twice.jsonl.gz > new-file.gz"),
    ),
    "cut.jsonl.gz": (gzip.compress(GOOD * 50)[:-9], ("cut.jsonl.gz: the compressed file is cut off", "again")),
    "plain.jsonl.gz": (GOOD, ("plain.jsonl.gz: the content is not gz", "rename it without .gz")),
    "alone.jsonl.xz": (
        lzma.compress(GOOD, lzma.FORMAT_ALONE),
        ("the content is not xz", "xz -dc --format=lzma < alone.jsonl.xz > alone.jsonl"),
    ),
    "zlib.jsonl.gz": (zlib.compress(GOOD, 0), ("the content is not gz", "compress or download it again")),
    "gzip.jsonl": (gzip.compress(GOOD), ("gzip.jsonl: the content is gz, but the name does not say so", "rename")),
    "flipped.jsonl.zst": (
        b"\x28\xb5\x2f\xfd" + b"garbage" * 9,
        ("the compressed file is damaged", "download it again"),
    ),
    "cut.jsonl.zst": (zstandard.compress(GOOD * 50)[:-3], ("cut.jsonl.zst: the compressed file is cut off", "again")),
    "plain.jsonl.zst": (GOOD, ("plain.jsonl.zst: the content is not zst", "rename it without .zst")),
    "garbage.parquet": (b"PAR1" + b"garbage" * 50 + b"PAR1", ("garbage.parquet: not a readable parquet file", "again")),
    "table.xml": (b"<a>1</a>\n", ("the ending of table.xml is not one that Onward reads", ".jsonl", ".parquet")),
    "headless.csv": (b"1,2\n3,4\n", ("headless.csv, line 2: no known row format", '"1", "2"', SHAPES)),
    "nameless": (GOOD, ("the ending of nameless is not one that Onward reads", "rename or convert it")),
    "row-101.jsonl": (
        lines(*({"prompt": f"{number}", "completion": "" if number == 101 else "x"} for number in range(1, 201))),
        ("row-101.jsonl, line 101: completion is empty", "or remove the row"),
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_whole(name: str, untouched: Path, tmp_path: Path) -> None:
    """A bad file ends with status 3 and a line that names file, place and remedy; it and its report are kept aside."""
    content, words = BAD_FILES[name]
    bad = tmp_path / name
    bad.write_bytes(content)
    assert_refused(onward("train", bad, "--run", untouched), 3, "1 of 1 files rejected, none added", name, *words)
    report = json.loads((untouched / "rejected" / f"{name}.report.json").read_text())
    assert name == report["file"]
    assert all(problem["reason"] and problem["remedy"] for problem in report["problems"])
    assert 1 <= len(report["problems"]) <= report["problem_count"]
    assert content == (untouched / "rejected" / name).read_bytes()
    assert content == bad.read_bytes()


def test_the_first_twenty_problems_are_named(untouched: Path, tmp_path: Path) -> None:
    """A file with many bad rows names the first 20 of them and counts the rest, on screen and in its report."""
    outcome = onward("add", tiny.write_jsonl(tmp_path / "many.jsonl", [{}] * 50), "--run", untouched)
    assert_refused(outcome, 3, "many.jsonl, line 1:", "many.jsonl, line 20:", "many.jsonl: and 30 more")
    assert "line 21" not in outcome.err
    report = json.loads((untouched / "rejected/many.jsonl.report.json").read_text())
    assert list(range(1, 21)) == [problem["line"] for problem in report["problems"]]
    assert (50, "line") == (report["problem_count"], report["unit"])


def test_one_bad_file_keeps_out_the_whole_command(untouched: Path, tmp_path: Path) -> None:
    """Of a good and a bad file in one command neither is added, so that the order of a stream never depends on luck."""
    good = tiny.write_jsonl(tmp_path / "fine.jsonl", tiny.chat_rows(8, seed=5))
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [{}])
    assert_refused(
        onward("train", good, bad, "--run", untouched), 3, "1 of 2 files rejected, none added", "bad.jsonl, line 1"
    )
    assert not (untouched / "rejected/fine.jsonl").exists()
    bad.rename(tmp_path / "bad.xml")
    assert_refused(
        onward("train", good, tmp_path / "bad.xml", "--run", untouched), 3, "1 of 2 files rejected", "bad.xml"
    )
    assert_refused(
        onward("train", good, tmp_path / "gone.jsonl", "--run", untouched), 2, "no such file", "nothing was added"
    )


def test_a_file_of_the_stream_is_refused_as_a_duplicate(untouched: Path, tmp_path: Path) -> None:
    """Content that was trained is refused under any name, and the refusal says how to train it once more."""
    copy = tmp_path / "copy.jsonl"
    shutil.copy(untouched.parent / "good.jsonl", copy)
    words = ("copy.jsonl: its content is that of file 1 of the stream (good.jsonl, done)", "--again")
    assert_refused(onward("train", copy, "--run", untouched), 3, *words)


def test_the_same_content_twice_in_one_command_is_refused(untouched: Path, tmp_path: Path) -> None:
    """A file given twice, or with a copy of it, is a duplicate within the command."""
    first = tiny.write_jsonl(tmp_path / "first.jsonl", tiny.chat_rows(8, seed=6))
    second = Path(shutil.copy(first, tmp_path / "second.jsonl"))
    assert_refused(
        onward("train", first, first, "--run", untouched), 3, "first.jsonl: its content is that of", "--again"
    )
    assert_refused(
        onward("train", first, second, "--run", untouched), 3, "second.jsonl: its content is that of", "--again"
    )


@pytest.mark.parametrize(
    "name",
    [
        "we ird $(rm) [red].jsonl",
        "new\nline\ttab\x1b[31m.jsonl",
        ".tmp-x.jsonl",
        "x" * 249 + ".jsonl",
        "中" * 83 + ".jsonl",
    ],
    ids=["shell", "control", "temporary", "long", "wide"],
)
def test_a_strange_name_is_kept_printable(name: str, untouched: Path, tmp_path: Path) -> None:
    """A refused file with any name is named in one printable line and kept under a name that fits."""
    bad = tmp_path / name
    bad.write_bytes(b"{}\n")
    before = set((untouched / "rejected").iterdir())
    outcome = onward("train", bad, "--run", untouched)
    assert_refused(outcome, 3, ".jsonl, line 1: no known row format", SHAPES)
    assert outcome.err.replace("\n", "").isprintable()
    assert 2 == len(set((untouched / "rejected").iterdir()) - before)


def test_a_name_that_is_no_text_is_refused_like_any_other(untouched: Path, tmp_path: Path) -> None:
    """A name of bytes that are not UTF-8 breaks neither the refusal nor its report."""
    bad = tmp_path / os.fsdecode(b"caf\xe9.xml")
    bad.write_bytes(b"{}\n")
    assert_refused(onward("train", bad, "--run", untouched), 3, "caf_.xml: the ending of", "rename or convert it")
    assert "caf_.xml" == json.loads((untouched / "rejected/caf_.xml.report.json").read_text())["file"]


def test_refused_files_of_one_name_are_all_kept(untouched: Path, tmp_path: Path) -> None:
    """A refused file never overwrites another of its name; the same content again does not pile up."""
    bad = tmp_path / "daily.jsonl"
    for content in (b"{}\n", b'{"a": 1}\n', b"{}\n"):
        bad.write_bytes(content)
        assert 3 == onward("train", bad, "--run", untouched).status
    kept = {path.name: path.read_bytes() for path in (untouched / "rejected").glob("daily*.jsonl")}
    assert {"daily.jsonl": b"{}\n", "daily-2.jsonl": b'{"a": 1}\n'} == kept


def test_what_is_no_regular_file_is_refused(untouched: Path, tmp_path: Path) -> None:
    """A directory and a missing file are wrong usage; a fifo is refused without waiting for a writer."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert_refused(onward("train", tmp_path, "--run", untouched), 2, "this is a directory", str(tmp_path), "*.jsonl")
    assert_refused(
        onward("train", tmp_path / "gone.jsonl", "--run", untouched), 2, "no such file", "gone.jsonl", "Check"
    )
    assert_refused(onward("train", tmp_path / "pipe.jsonl", "--run", untouched), 3, "special file", "copy its content")


def test_rows_that_are_all_too_long_to_keep_are_refused(model: Path, tmp_path: Path) -> None:
    """With over_length=drop a file whose rows are all too long is refused: it would train no step."""
    run = make_run(tmp_path / "run", model, "max_length=20", "over_length=drop")
    outcome = onward("train", tiny.write_jsonl(tmp_path / "long.jsonl", tiny.chat_rows(5)), "--run", run)
    assert_refused(outcome, 3, "long.jsonl: all 5 rows are longer than max_length = 20", "raise max_length")


def test_one_row_too_long_refuses_the_file_if_told_so(model: Path, tmp_path: Path) -> None:
    """With over_length=reject the one long row is named with its length."""
    run = make_run(tmp_path / "run", model, "max_length=60", "over_length=reject")
    long = tmp_path / "long.jsonl"
    long.write_bytes(GOOD + lines({"prompt": "a", "completion": "b" * 100}))
    assert_refused(
        onward("train", long, "--run", run), 3, "long.jsonl, line 2: the row has 102 tokens", "shorten the row"
    )


def test_chats_need_a_chat_template(tmp_path: Path) -> None:
    """Where the tokenizer has no chat template chat rows are refused, and the remedy names what works."""
    bare = tiny.save_tiny_model(tmp_path / "bare", layers=1, tokenizer=tiny.byte_tokenizer(None))
    run = make_run(tmp_path / "run", bare)
    outcome = onward("train", tiny.write_jsonl(tmp_path / "chat.jsonl", tiny.chat_rows(2)), "--run", run)
    assert_refused(outcome, 3, "chat.jsonl, line 1: the tokenizer has no chat template", "use prompt/completion rows")


def test_every_format_is_trained(model: Path, tmp_path: Path) -> None:
    """Files of every format and kind of row, with BOM, CRLF and blank lines, train in one command, every row once."""
    import pyarrow
    import pyarrow.parquet

    pair = [{"prompt": f"{number}?", "completion": f"{number}!"} for number in range(3)]
    shares = [{"conversations": [{"from": "human", "value": str(n)}, {"from": "gpt", "value": "b"}]} for n in range(2)]
    alpaca = [{"instruction": "add", "input": f"{number} and 1", "output": f"{number + 1}"} for number in range(4)]
    dos = b"\xef\xbb\xbf" + lines(*tiny.chat_rows(5)).replace(b"\n", b"\r\n") + b"\r\n\r\n"
    contents = {
        "dos.jsonl": (5, dos),
        "pairs.jsonl.gz": (3, gzip.compress(lines(*pair))),
        "shares.jsonl.zst": (2, zstandard.compress(lines(*shares))),
        "alpaca.json": (4, json.dumps(alpaca, indent=1).encode()),
        "lines.txt": (2, b"\xef\xbb\xbfone line\r\n\r\nanother\n"),
        "upper.JSONL": (1, lines({"text": "no newline at the end"})[:-1]),
    }
    files = [tmp_path / name for name in contents]
    for file, (_, content) in zip(files, contents.values(), strict=True):
        file.write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tiny.chat_rows(6)), tmp_path / "table.parquet")
    run = make_run(tmp_path / "run", model)
    outcome = onward("train", *files, tmp_path / "table.parquet", "--run", run, "--json")
    assert 0 == outcome.status, outcome.err
    expected = {name: rows for name, (rows, _) in contents.items()} | {"table.parquet": 6}
    assert expected == {entry["name"]: entry["rows"] for entry in outcome.json}
    assert expected == {entry["name"]: entry["rows_trained"] for entry in outcome.json}
    assert 0 == onward("verify", "--run", run).status


def test_strange_names_are_trained(model: Path, tmp_path: Path) -> None:
    """A good file with any name is trained, and its original is kept under a name that fits."""
    names = ["a b\n[bold].jsonl", ".tmp-x.jsonl", "x" * 249 + ".jsonl", os.fsdecode(b"caf\xe9.jsonl")]
    files = [tiny.write_jsonl(tmp_path / name, tiny.chat_rows(2, seed)) for seed, name in enumerate(names)]
    run = make_run(tmp_path / "run", model)
    outcome = onward("train", *files, "--run", run, "--json")
    assert 0 == outcome.status, outcome.err
    assert 4 == len(outcome.json) == len(list((run / "archive").iterdir()))
    assert 0 == onward("verify", "--run", run).status
    assert 0 == onward("history", "--run", run).status


def test_the_run_goes_on_after_every_refusal(run: Path, tmp_path: Path) -> None:
    """After all that was refused above, a good file continues the run, and so does a duplicate that is asked for."""
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [{}])
    assert 3 == onward("train", bad, "--run", run).status
    bad.write_bytes(lines(*tiny.chat_rows(8, seed=9)))
    mended = onward("train", bad, "--run", run, "--json")
    assert 0 == mended.status, mended.err
    assert [("bad.jsonl", 3, 4, "bitwise")] == [
        (entry["name"], entry["first_step"], entry["last_step"], entry["handover"]) for entry in mended.json
    ]
    again = onward("train", run.parent / "good.jsonl", "--again", "--run", run, "--json")
    assert 0 == again.status, again.err
    assert [3] == [entry["position"] for entry in again.json]
    assert 0 == onward("verify", "--run", run).status
