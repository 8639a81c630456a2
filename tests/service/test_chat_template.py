"""`chat_template`: a run's own template instead of the tokenizer's, kept in the run and locked with it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
import tiny
from commands import SMALL, assert_refused, make_run, onward
from trait_templates import template_text

from onward.config import Config
from onward.config.text import read_config
from onward.data.templates.own_template import find_template
from onward.data.tokenizer import TokenizerState
from onward.errors import ConfigError
from onward.store.ledger import Ledger

TEXT = tiny.CHATML.replace("message['role']", "message['role'] | upper").replace("assistant\n", "ASSISTANT\n")
"""A template that differs from that of the tiny model."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of four chats."""
    return tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4))


def first_text(run: Path, rows: Path) -> str:
    """Return what `preview` shows of the first row."""
    shown = onward("preview", rows, "--run", run, "--json", "--rows", 1)
    assert 0 == shown.status, shown.err
    return "".join(segment["text"] for segment in shown.json[0]["segments"])


def test_a_run_keeps_a_copy_and_gives_it_to_inference(
    tmp_path: Path, model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was named is needed once; rows, preview and checkpoints have its text, wherever the run lies."""
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text(TEXT.replace("\n", "\r\n"))
    make_run(tmp_path / "run", model, "chat_template=mine.txt")
    Path("mine.txt").unlink()
    run = (tmp_path / "run").rename(tmp_path / "moved")
    assert "mine.jinja" == read_config(run / "onward.yaml").chat_template
    assert first_text(run, rows).startswith("<|im_start|>USER\n")
    assert 0 == onward("train", rows, "--run", run).status
    assert TEXT == (run / "current_model" / "chat_template.jinja").read_text()
    assert 0 == onward("verify", "--run", run).status
    findings = {finding["subject"]: finding for finding in onward("doctor", "--run", run, "--json").json}
    assert ("ok", "mine.jinja, the run's own") == tuple(findings["chat template"][key] for key in ("level", "message"))


@pytest.mark.parametrize("had_one", [True, False])
def test_the_template_for_chats_with_tools_is_locked_too(
    tmp_path: Path, model: Path, rows: Path, had_one: bool
) -> None:
    """A model's template `tool_use` that appears or changes after a run has trained is refused; a run whose ledger is
    of a release that did not lock it goes on, and locks it.
    """
    folder = shutil.copytree(model, tmp_path / "model")
    tools = folder / "additional_chat_templates/tool_use.jinja"
    tools.parent.mkdir()
    if had_one:
        tools.write_text("{{ tools }}" + tiny.CHATML)
    run = make_run(tmp_path / "run", folder)
    assert 0 == onward("train", rows, "--run", run).status
    tools.write_text("{{ tools | length }}" + tiny.CHATML)
    more, last = (tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(4, seed=n)) for n in (1, 2))
    for command in ("add", "preview", "train"):
        assert_refused(onward(command, more, "--run", run), 1, "tokenizer or chat template changed on disk")
    with Ledger(run / "ledger.sqlite3") as ledger:
        locked = ledger.get("identity")
        ledger.put(identity={key: value for key, value in locked.items() if key != "tokenizer_extras"})
    assert 0 == onward("train", more, "--run", run).status
    tools.write_text("{{ tools }}" + tiny.CHATML)
    for command in ("add", "preview", "train"):
        assert_refused(onward(command, last, "--run", run), 1, "tokenizer or chat template changed on disk")


def test_it_is_locked_once_the_run_has_trained(tmp_path: Path, model: Path, rows: Path) -> None:
    """Before that, a change acts; after it, another name is refused by name and another text as a change on disk."""
    run = make_run(tmp_path / "run", model)
    config = (run / "onward.yaml").read_text()
    assert first_text(run, rows).startswith("<|im_start|>user\n")
    (run / "mine.jinja").write_text(TEXT)
    named = config.replace("chat_template: null", "chat_template: mine.jinja")
    (run / "onward.yaml").write_text(named)
    assert first_text(run, rows).startswith("<|im_start|>USER\n")
    assert 0 == onward("train", rows, "--run", run).status
    more = tiny.write_jsonl(tmp_path / "b.jsonl", tiny.chat_rows(4, seed=1))
    (run / "mine.jinja").write_text(TEXT + " ")
    for command in ("add", "preview", "train"):
        assert_refused(onward(command, more, "--run", run), 1, "tokenizer or chat template changed on disk")
    proof = onward("verify", "--run", run)
    assert (5, 1) == (proof.status, proof.out.count("FAILED  base model: the tokenizer or chat template changed"))
    (run / "mine.jinja").write_text(TEXT)
    (run / "onward.yaml").write_text(config)
    for command in ("add", "preview", "train"):
        outcome = onward(command, more, "--run", run)
        assert_refused(outcome, 2, "chat_template: the run has 'mine.jinja', the config says None")
    (run / "onward.yaml").write_text(named)
    assert 0 == onward("add", more, "--run", run).status


def test_a_run_of_an_earlier_release_has_the_tokenizers_own(run: Path, tmp_path: Path) -> None:
    """Its identity has no such key: it goes on, and a template that is set now is refused by name."""
    with sqlite3.connect(run / "ledger.sqlite3") as ledger:
        (text,) = ledger.execute("SELECT value FROM run WHERE key = 'identity'").fetchone()
        identity = {key: value for key, value in json.loads(text).items() if key != "chat_template"}
        ledger.execute("UPDATE run SET value = ? WHERE key = 'identity'", (json.dumps(identity),))
    ledger.close()
    file = tiny.write_jsonl(tmp_path / "b.jsonl", tiny.chat_rows(4, seed=1))
    assert 0 == onward("train", file, "--run", run).status
    (run / "mine.jinja").write_text(TEXT)
    config = (run / "onward.yaml").read_text()
    (run / "onward.yaml").write_text(config.replace("chat_template: null", "chat_template: mine.jinja"))
    file = tiny.write_jsonl(tmp_path / "c.jsonl", tiny.chat_rows(4, seed=2))
    for command in ("add", "train"):
        assert_refused(onward(command, file, "--run", run), 2, "chat_template: the run has None")


def test_a_template_that_trl_ships_is_named(tmp_path: Path, model: Path, rows: Path) -> None:
    """A template for training is copied from the installed TRL, which the run then no longer needs."""
    run = make_run(tmp_path / "run", model, "chat_template=qwen3_training")
    assert template_text("qwen3_training") == (run / "qwen3_training.jinja").read_text()
    assert "<think>\n\n</think>" in first_text(run, rows)
    assert ("qwen3_training.jinja", template_text("qwen3_training")) == find_template("qwen3_training", run)


def test_what_is_no_template_is_refused_before_anything_is_made(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing, empty, torn, not Jinja, not text, unknown: each is said with the way out, and no run is made."""
    contents = {"empty.jinja": b" \n", "torn.jinja": b"{% for m in messages %}", "binary.jinja": b"\xff\xfe"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    reasons = {
        str(tmp_path / "empty.jinja"): "the chat template is empty",
        str(tmp_path / "torn.jinja"): "not valid Jinja",
        str(tmp_path / "binary.jinja"): "cannot be read",
        "no/such.jinja": "there is no such chat template",
        "qwen3": "Did you mean qwen3_training?",
        "": "chat_template: '' is refused",
    }
    for value, reason in reasons.items():
        words = ["--set", f"chat_template={json.dumps(value)}"]
        assert_refused(onward("init", tmp_path / "run", "--model", model, *words), 2, reason)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match="not installed") as refusal:
        find_template("qwen3_training", tmp_path)
    assert refusal.value.hint is not None
    assert "pip install 'onward[templates]', or bring the file" in refusal.value.hint
    assert not (tmp_path / "run").exists()


def test_a_config_that_was_there_first_may_name_a_file_outside(tmp_path: Path, model: Path, rows: Path) -> None:
    """The config is the user's and stays as it is; the run has its copy, should the file go away."""
    (tmp_path / "run").mkdir()
    (tmp_path / "t.jinja").write_text(TEXT)
    (tmp_path / "run" / "onward.yaml").write_text(f"model: {model}\nchat_template: {tmp_path / 't.jinja'}\n")
    assert 0 == onward("init", tmp_path / "run").status
    (tmp_path / "t.jinja").unlink()
    assert first_text(tmp_path / "run", rows).startswith("<|im_start|>USER\n")


def test_a_file_of_that_name_is_not_overwritten(tmp_path: Path, model: Path) -> None:
    """A directory that becomes a run keeps the user's file; the same text does not count as another file."""
    (tmp_path / "run").mkdir()
    mine, other = tmp_path / "t.jinja", tmp_path / "run" / "t.jinja"
    mine.write_text(TEXT)
    other.write_text("other")
    words = ["init", tmp_path / "run", "--model", model, "--set", f"chat_template={mine}"]
    assert_refused(onward(*words), 2, "another file has it")
    assert "other" == other.read_text()
    other.write_text(TEXT)
    assert 0 == onward(*words).status


def test_an_adopted_checkpoint_gets_one(tmp_path: Path, model: Path, rows: Path) -> None:
    """`adopt` takes the key as `init` does."""
    run = make_run(tmp_path / "run", model)
    assert 0 == onward("train", rows, "--run", run).status
    (checkpoint,) = (run / "current_model").glob("checkpoint-*")
    (tmp_path / "t.jinja").write_text(TEXT)
    words = [word for setting in (*SMALL, f"chat_template={tmp_path / 't.jinja'}") for word in ("--set", setting)]
    adopted = onward("adopt", checkpoint, "--run", tmp_path / "adopted", *words)
    assert 0 == adopted.status, adopted.err
    assert TEXT == (tmp_path / "adopted" / "current_model" / "chat_template.jinja").read_text()
    assert first_text(tmp_path / "adopted", rows).startswith("<|im_start|>USER\n")
    assert 0 == onward("train", rows, "--run", tmp_path / "adopted").status


def test_digests_of_runs_without_one_are_what_they_were() -> None:
    """What a step follows from has the key only where it is set; the fingerprint is that of a tokenizer that has it."""
    assert "chat_template" not in Config().training()
    assert "t.jinja" == Config(chat_template="t.jinja").training()["chat_template"]
    assert tiny.byte_state(TEXT) == tiny.byte_state().with_template(TEXT)
    assert tiny.byte_state() == tiny.byte_state().with_template(None)
    tokenizer = tiny.byte_tokenizer(None)
    tokenizer("ab", truncation=True, max_length=1)
    assert tiny.byte_state(TEXT).fingerprint == TokenizerState.of(tokenizer).with_template(TEXT).fingerprint
