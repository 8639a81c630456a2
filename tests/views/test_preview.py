"""`onward preview`: rows as they would be trained, shown without anything being changed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import assert_refused, make_run, onward, snapshot
from hypothesis import given
from hypothesis import strategies as st
from runs import new_run

from onward.data.files.sources import read_rows
from onward.data.row_tokenizer import RowTokenizer
from onward.data.rows.records import parse_record
from onward.data.tokenized import unpack
from onward.layout import RunLayout
from onward.service.lock import RunLock
from onward.store.ledger import Ledger
from onward.terminal import marker
from onward.training.steps.anchor import AnchorTerm
from onward.views.estimate import TIMED, estimate
from onward.views.preview import PACE, Segment, ShownRow, lines_of, preview, split_text

STATE = tiny.byte_state()
NASTY = "\x1b[2Jred\x9b31m\u202e\r"
ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nyou"}]},
    {"prompt": "a\u00e9", "completion": "\U0001f600 b"},
    {"text": NASTY},
    {"text": "word " * 80},
]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def decode(ids: list[int]) -> str:
    """Return the text of token ids, special tokens included."""
    return STATE.tokenizer.decode(ids, skip_special_tokens=False)


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Return every file of a folder with the hash of its content and its time."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), st.data())
def test_segments_are_the_decoded_text(text: str, data: st.DataObject) -> None:
    """Joined they are what all tokens decode to, wherever characters are torn; neighbours differ, none is empty."""
    ids = np.array(STATE.tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False).ids)
    targets = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    segments = split_text(ids, targets, decode)
    assert decode(ids.tolist()) == "".join(segment.text for segment in segments)
    kinds = [segment.trained for segment in segments]
    assert all(one != other for one, other in pairwise(kinds))
    assert all(segment.text for segment in segments)


def test_a_torn_character_belongs_to_the_piece_in_which_it_ends() -> None:
    """A character is shown whole."""
    ids = np.array(STATE.tokenizer.encode("a\u00e9b", add_special_tokens=False).ids)
    targets = np.array([False, False, True, False])
    assert [Segment("a", False), Segment("\u00e9", True), Segment("b", False)] == split_text(ids, targets, decode)


def test_json_has_the_rows_as_they_are_trained(untouched: Path, tmp_path: Path) -> None:
    """Each row comes with its line, its number of tokens, whether it was cut, and its text in marked pieces."""
    file = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    shown = onward("preview", file, "--run", untouched, "--json")
    assert (0, 5) == (shown.status, len(shown.json))
    assert {
        "line": 1,
        "tokens": 32,
        "cut": False,
        "segments": [
            {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "trained": False},
            {"text": "Hello\nyou<|im_end|>", "trained": True},
            {"text": "\n", "trained": False},
        ],
    } == shown.json[0]
    assert [[2, 10, False], [3, 17, False], [4, 255, False], [4, 146, False]] == [
        [row["line"], row["tokens"], row["cut"]] for row in shown.json[1:]
    ]
    texts = ["".join(segment["text"] for segment in row["segments"]) for row in shown.json]
    tokenizer = RowTokenizer(STATE, 256)
    for text, source in zip((*texts[:3], "".join(texts[3:])), read_rows(file), strict=True):
        (packed,) = tokenizer.encode([tokenizer.prepare(parse_record(source.value))])
        assert decode(unpack(packed).ids.tolist()) == text
    assert shown.json[:2] == onward("preview", file, "--run", untouched, "--json", "--rows", 2).json


def test_nothing_is_changed_while_another_process_owns_the_run(run: Path, tmp_path: Path) -> None:
    """Preview takes no lock and writes nothing, whether it shows or refuses."""
    good, bad = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS), tiny.write_jsonl(tmp_path / "b.jsonl", [{"text": ""}])
    before = files_of(run)
    with RunLock(RunLayout(run).lock):
        assert [0, 3] == [onward("preview", file, "--run", run).status for file in (good, bad)]
    after = files_of(run)
    shared = (".lock", "ledger.sqlite3-shm")  # the other process's, and what SQLite's readers share
    assert [] == [name for name in before | after if before.get(name) != after.get(name) and name not in shared]


def test_a_refused_file_is_reported_as_add_reports_it(run: Path, tmp_path: Path) -> None:
    """All of a file is judged, whatever number of rows is asked for: the lines are those of `add`."""
    last = tiny.write_jsonl(tmp_path / "last.jsonl", [*tiny.chat_rows(3), {"messages": []}, {"x": NASTY}])
    ending, empty = tmp_path / "a.docx", tmp_path / "empty.jsonl"
    ending.write_text("x")
    empty.write_text("")
    for file in (last, ending, empty):
        seen, added = onward("preview", file, "--run", run, "--rows", 1), onward("add", file, "--run", run)
        assert_refused(seen, 3, file.name)
        assert added.err.splitlines()[1:-1] == seen.err.splitlines()[1:-1]


def test_what_is_no_file_is_wrong_usage(untouched: Path, tmp_path: Path) -> None:
    """A missing file, a directory and a directory without a run are refused."""
    assert_refused(onward("preview", tmp_path / "no.jsonl", "--run", untouched), 2, "no such file")
    assert_refused(onward("preview", tmp_path, "--run", untouched), 2, "a directory")
    assert_refused(onward("preview", tmp_path / "no.jsonl", "--run", tmp_path), 2, "no run")


def test_people_see_three_rows(untouched: Path, tmp_path: Path) -> None:
    """Without a terminal, trained text is in brackets; a row cannot control the terminal; the rest is counted."""
    link = tmp_path / "link.jsonl"
    link.symlink_to(tiny.write_jsonl(tmp_path / "blob", ROWS))
    shown = onward("preview", link, "--run", untouched)
    assert 0 == shown.status, shown.err
    expected = [
        "line 1: 32 tokens, 10 trained",
        "  | <|im_start|>user",
        "  | Hi<|im_end|>",
        "  | <|im_start|>assistant",
        "  | \u27e6Hello",
        "  | you<|im_end|>\u27e7",
        "  |",
        "line 2: 10 tokens, 7 trained",
        "  | a\u00e9\u27e6\U0001f600 b<|im_end|>\u27e7",
        "line 3: 17 tokens, 16 trained",
        r"  | \x1b" + "\u27e6" + r"[2Jred\x9b31m\u202e\r<|im_end|>" + "\u27e7",
    ]
    assert expected == shown.out.splitlines()
    assert "link.jsonl: 3 of 5 rows shown (1 text split at max_length=256); " in shown.err


def test_a_json_value_with_odd_characters_is_ascii(untouched: Path, tmp_path: Path) -> None:
    """No character that a terminal obeys reaches it, and the value is the same."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": NASTY}]))
    shown = onward("preview", file, "--run", untouched, "--json")
    assert all(line.isprintable() for line in shown.out.splitlines())
    assert f"{NASTY}<|im_end|>" == "".join(segment["text"] for segment in shown.json[0]["segments"])


def test_a_terminal_underlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of trained text is underlined apart, its end shown by a sign; NO_COLOR and no terminal get brackets."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    row = ShownRow(7, 3, 2, False, [Segment("a\n", False), Segment("b\nc", True)])
    underlined = ["  | a", "  | \x1b[4;32mb\u23ce\x1b[0m", "  | \x1b[4;32mc\x1b[0m"]
    assert ["row 7: 3 tokens, 2 trained", *underlined] == lines_of(row, "row", marker(Terminal()))
    brackets = ["  | a", "  | \u27e6b", "  | c\u27e7"]
    assert brackets == lines_of(row, "row", marker(io.StringIO()))[1:]
    monkeypatch.setenv("NO_COLOR", "1")
    assert brackets == lines_of(row, "row", marker(Terminal()))[1:]


def test_rows_that_are_left_out_are_counted(tmp_path: Path, model: Path) -> None:
    """A row that the length policy drops is trained by nobody, so it is not shown."""
    run = make_run(tmp_path / "run", model, "over_length=drop", "epochs=3")
    shown = onward("preview", tiny.write_jsonl(tmp_path / "a.jsonl", ROWS), "--run", run)
    left_out = "1 of 4 rows dropped at max_length=256: 401 tokens lost, 87 %"
    assert f"3 of 3 rows shown ({left_out}); 59 tokens, 33 of them trained; 3 steps\n" in shown.err


def test_neither_torch_nor_transformers_is_imported(run: Path, tmp_path: Path) -> None:
    """What users run over and over starts at once."""
    file = tiny.write_jsonl(tmp_path / "a.jsonl", ROWS)
    code = (
        "import sys; from pathlib import Path; from onward.layout import RunLayout;"
        "from onward.views.preview import preview;"
        f"list(preview(RunLayout(Path({str(run)!r})), Path({str(file)!r}), None, worst=False).rows());"
        "print(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout


def test_the_longest_rows_come_first(run: Path, tmp_path: Path) -> None:
    """`--worst` shows the longest rows of a file, those that are cut before all others, longest first."""
    rows = [{"prompt": "?", "completion": "x" * length} for length in (10, 300, 50, 400, 40)]
    path = tiny.write_jsonl(tmp_path / "long.jsonl", rows)
    worst = onward("preview", path, "--worst", "--rows", 3, "--run", run, "--json").json
    assert [(2, True), (4, True), (3, False)] == [(row["line"], row["cut"]) for row in worst]
    every = onward("preview", path, "--run", run, "--json").json
    assert [1, 2, 3, 4, 5] == [row["line"] for row in every]
    assert sorted((row["tokens"] for row in every), reverse=True)[:3] == [row["tokens"] for row in worst]


def test_an_estimate_is_measured_on_a_copy(untouched: Path, tmp_path: Path) -> None:
    """Steps and tokens are those that training takes, memory and time were measured, and the run stays as it is."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(10, 3))
    found = onward("preview", path, "--estimate", "--price", 3600, "--run", untouched, "--json").json
    steps = [row["tokens"] for row in onward("preview", path, "--run", untouched, "--json").json]
    assert (3, sum(steps), 3) == (found["steps"], found["tokens"], found["timed_steps"])
    assert found["seconds"] == found["tokens"] / found["tokens_per_second"]
    assert found["seconds"] == pytest.approx(found["cost"])
    assert max(steps) <= found["heaviest_tokens"] <= sum(sorted(steps)[-4:])
    assert 1 << 20 < found["memory_bytes"] < found["memory_total_bytes"]
    line = onward("preview", path, "--estimate", "--run", untouched)
    assert "for 3 steps on" in line.out
    assert_refused(onward("preview", path, "--price", 1, "--run", untouched), 2, "Add --estimate")


def test_an_estimate_takes_steps_as_training_does(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The anchor's term is in the steps of an estimate, though its texts are not written yet, and are not written."""
    anchor = {"rows": 3, "tokens": 8, "weight": 0.5}
    run = new_run(tmp_path / "run", model, lora={"rank": 2}, anchor=anchor, batch_size=2)
    path, seen = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(10)), list[float]()
    add_gradients = AnchorTerm.add_gradients

    def spy(*args: Any) -> list[torch.Tensor]:
        found = add_gradients(*args)
        seen.append(float(torch.stack(found).sum()))
        return found

    monkeypatch.setattr(AnchorTerm, "add_gradients", spy)
    before = snapshot(run.layout.root)
    found = estimate(run.layout, path)
    assert before == snapshot(run.layout.root)
    assert found.timed_steps + 1 == len(seen)
    assert all(map(math.isfinite, seen))


@pytest.mark.parametrize("settings", [{}, {"holdout": 0.3, "epochs": 2, "replay": {"share": 0.5, "policy": "uniform"}}])
def test_what_is_estimated_is_what_is_trained(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Steps, tokens and the heaviest step are those that training takes then: without rows that are held out, with
    those that are replayed. The time at the pace so far is that of about as many tokens.
    """
    run = new_run(tmp_path / "run", model, batch_size=2, max_length=128, lora={"rank": 2}, **settings)
    first, path = (tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (40, 30))
    run.train(first)
    before = snapshot(run.layout.root)
    found = estimate(run.layout, path, 10.0)
    seen = preview(run.layout, path, None, worst=False)
    assert before == snapshot(run.layout.root)
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        paced = ledger.last_steps(1, PACE)
    pace = sum(step.tokens for step in paced) / sum(step.seconds for step in paced)
    run.train(path)
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        taken = [step.tokens for step in ledger.steps(2)]
        (held_out,) = (row.held_out for row in ledger.files("done") if row.id == 2)
    assert (len(taken), sum(taken), max(taken)) == (found.steps, found.tokens, found.heaviest_tokens)
    assert (len(taken), TIMED, held_out) == (seen.steps, found.timed_steps, seen.held_out)
    assert found.cost == found.seconds / 3600 * 10.0
    assert seen.seconds is not None
    assert sum(taken) == pytest.approx(seen.seconds * pace, rel=0.1)
