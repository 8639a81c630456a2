"""`onward chat`: one message or a conversation, on a terminal or not, alongside a process that trains."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import assert_refused, onward
from faults import copy_run
from processes import apart

from onward import Run
from onward.cli.commands.talk import NICENESS, give_way
from onward.layout import RunLayout
from onward.service.lock import RunLock
from onward.terminal import open_standard_streams
from onward.views.chat.engine import Engine
from onward.views.chat.sampling import Sampling
from onward.views.chat.terminal import Asking, Chat, typed_lines

GREEDY = Sampling(temperature=0.0, max_tokens=12)


def test_control_characters_never_reach_the_terminal(stream: Path) -> None:
    """What the model writes is shown as escapes; as JSON it is what the model wrote."""
    options = ["--temperature", 3, "--top-p", 1, "--max-tokens", 150, "--seed", 5, "--message", "Hi", "--run", stream]
    shown, exact = onward("chat", *options), onward("chat", *options, "--json")
    assert any(not character.isprintable() for character in exact.json["answer"].replace("\n", ""))
    assert all(character.isprintable() for character in shown.out.replace("\n", "").replace("\t", ""))
    assert "step 5, after file 3 (c.jsonl) answers" in shown.err


def test_one_message_as_json(stream: Path) -> None:
    """`--message --json` prints the answer, the state that gave it and the settings; greedy is the same each time."""
    options = ["--message", "Hi", "--json", "--temperature", 0, "--max-tokens", 8, "--run", stream]
    first, second = (onward("chat", *options).json for _ in range(2))
    assert first["answer"] == second["answer"]
    assert ("Hi", 5, "step 5, after file 3 (c.jsonl)") == (first["message"], first["step"], first["at"])
    both = onward("chat", *options, "--compare", "b.jsonl", "c.jsonl").json
    assert [3, 5] == [answer["step"] for answer in both["answers"]]
    assert first["answer"] == both["answers"][1]["answer"]
    assert both["answers"][0]["sampling"] == both["answers"][1]["sampling"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compare", "a", "b", "--at", "b.jsonl"], ["--compare already names both states"]),
        (["--at", "b.jsonl", "--refresh"], ["--refresh follows the newest commit"]),
        (["--json"], ["--json works with one message"]),
        (["--at", "never.jsonl", "--message", "Hi"], ["neither a finished file", "--at"]),
        (["--temperature", "-1", "--message", "Hi"], ["temperature cannot be -1.0"]),
    ],
)
def test_what_cannot_be_is_refused(stream: Path, options: list[str], words: list[str]) -> None:
    """With the way out, before a model is loaded."""
    assert_refused(onward("chat", "--run", stream, *options), 2, *words)


def test_a_conversation(stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes on from what was said; commands begin anew, change the state, save what was said as a row."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    saved = tmp_path / "saved.jsonl"
    lines = [
        "One?", "Two?", f"/save {saved}", "/save", "/system Be brief.", "Three?", f"/save {saved}", "/at b.jsonl",
        "/at nowhere", "/nonsense", "/save x.txt", "/save ~nobody-there/x.jsonl", "/help", "/quit", "never asked",
    ]  # fmt: skip
    with Chat(layout, Asking([None], Sampling(2.0, max_tokens=12), seed=1), give_way) as chat:
        chat.talk(iter(lines))
    rows = [json.loads(line)["messages"] for line in saved.read_text().splitlines()]
    assert [["user", "assistant"] * 2, ["system", "user", "assistant"]] == [
        [message["role"] for message in row] for row in rows
    ]
    assert ["One?", "Two?"] == [message["content"] for message in rows[0][::2]]
    dropped = [json.loads(path.read_text())["messages"] for path in layout.inbox.iterdir()]
    assert [rows[0]] == dropped
    seen = capsys.readouterr()
    for words in (
        "step 5, after file 3 (c.jsonl) answers", "step 3, after file 2 (b.jsonl) answers",
        "'nowhere' is neither a finished file", "there is no command /nonsense", "rows are saved in a .jsonl file",
        "the row cannot be saved: No such file or directory",
    ):  # fmt: skip
        assert words in seen.err
    assert 3 <= len(seen.out.splitlines())
    run = Run(layout.root)
    assert ["done"] == [entry["state"] for entry in run.train(saved)]  # what was saved is a file that can be trained


def test_a_failure_of_the_model_ends_an_answer_and_not_the_chat(
    stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was said before stays, and none of the states that are compared keeps a message that one did not answer."""
    saved = tmp_path / "saved.jsonl"
    with Chat(RunLayout(stream), Asking(["b.jsonl", None], Sampling(0.0, max_tokens=4)), give_way) as chat:
        talk = iter(["One?", "Two?", f"/save {saved}"])
        chat.talk(itertools.islice(talk, 1))
        generate = Engine._generate
        fails = iter([False, True])

        def fail(engine: Engine, *arguments: Any) -> None:
            if next(fails):
                raise MemoryError("no memory for keys and values")
            generate(engine, *arguments)

        monkeypatch.setattr(Engine, "_generate", fail)
        chat.talk(talk)
        assert [["One?"]] * 2 == [[turn["content"] for turn in column.turns[::2]] for column in chat._columns]
    assert "onward: the model cannot answer: no memory for keys and values" in capsys.readouterr().err
    assert ["One?"] == [row["messages"][0]["content"] for row in map(json.loads, saved.read_text().splitlines())]


def test_it_goes_on_to_newer_commits(stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--refresh` each message is answered by the newest commit, unless `/at` named a state; without it by the one
    that was loaded. While the newest one cannot be read, the one in memory answers."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    rows = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.chat_rows(3, seed=3))

    def lines() -> Iterator[str]:
        yield "One?"
        Run(layout.root).train(rows, again=True)
        aside = layout.config.rename(tmp_path / "aside")
        layout.config.symlink_to(layout.config)  # nothing at this name can be opened
        yield "Two?"
        aside.replace(layout.config)
        yield "Three?"

    asking = Asking([None], GREEDY, refresh=True)
    with (
        Chat(layout, asking, give_way) as chat,
        Chat(layout, asking, give_way) as moved,
        Chat(layout, Asking([None], GREEDY), give_way) as staying,
    ):
        moved.talk(iter(["/at b.jsonl"]))
        (before,) = moved.once("Two?")
        chat.talk(lines())
        moved.talk(iter(["Two?"]))
        assert [6] == [answer["step"] for answer in chat.once("Three?")]
        assert [5] == [answer["step"] for answer in staying.once("Three?")]
        assert [before["step"]] == [answer["step"] for answer in moved.once("Three?")]
        moved.talk(iter(["/at"]))
        assert [6] == [answer["step"] for answer in moved.once("Three?")]
    told = capsys.readouterr().err
    assert 1 == told.count("the newest commit cannot be loaded: it cannot be read: Too many levels of symbolic links")
    assert "step 6, after file 4 (d.jsonl) answers" in told


def _answer_beside(root: Path) -> None:
    layout, begun = RunLayout(root), os.getpriority(os.PRIO_PROCESS, 0)
    with Chat(layout, Asking([None], GREEDY, seed=0), give_way) as chat:
        nice = [os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path("/proc/self/task").iterdir()]
        os._exit(0 if chat.once("Hi")[0]["step"] == 5 and set(nice) == {max(NICENESS, begun)} else 7)


def test_beside_a_process_that_trains(stream: Path, tmp_path: Path) -> None:
    """While another process owns the run the last commit answers, and every thread gives way."""
    root = copy_run(stream, tmp_path / "run")
    before = Run(root).status()["global_step"]
    with RunLock(RunLayout(root).lock):
        assert 0 == apart(_answer_beside, root)
    assert before == Run(root).status()["global_step"]
    assert Run(root).verify().ok


def test_bytes_that_are_no_text_are_refused_and_the_chat_goes_on(
    stream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a terminal in another encoding, or a pipe, sends them, whatever the locale says of such bytes."""
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nTwo?\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdin", typed)
    open_standard_streams()
    with Chat(RunLayout(stream), Asking([None], GREEDY), give_way) as chat:
        chat.talk(typed_lines())
        assert ["Two?"] == [turn["content"] for turn in chat._columns[0].turns[::2]]
    assert "some of its bytes were not UTF-8" in capsys.readouterr().err


def test_a_run_without_a_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model goes on with what is typed, and a saved row is the last prompt with its completion."""
    base = tiny.save_tiny_model(tmp_path / "base", tokenizer=tiny.byte_tokenizer(None))
    run = Run.create(tmp_path / "run", str(base), batch_size=2, lora={"rank": 2})
    run.train(tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "the river runs past the house"}]))
    with Chat(run.layout, Asking([None], GREEDY, seed=0), give_way) as chat:
        chat.talk(iter(["the house", "the river", f"/save {tmp_path / 's.jsonl'}"]))
        (answer,) = chat.once("the river")
    assert len("the river") == answer["prompt_tokens"]
    assert ["the river", answer["answer"]] == list(json.loads((tmp_path / "s.jsonl").read_text()).values())
    assert "no chat template" in capsys.readouterr().err
