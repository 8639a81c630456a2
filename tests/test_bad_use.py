"""Bad use, against the command line: a clear refusal, an exit status, and the run left as it was."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from commands import assert_refused, onward, onward_process, snapshot
from transformers import GPT2Config, GPT2LMHeadModel

from onward import Run
from onward.config.text import read_config
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.service.lock import RunLock
from onward.status import read_grid


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("Usage:", "Commands:")),
        (["learn"], ("No such command 'learn'", "onward --help")),
        (["train", "--fast"], ("No such option: --fast", "onward train --help")),
        (["add"], ("Missing argument", "onward add --help")),
        (["rollback"], ("Missing option '--to'", "onward rollback --help")),
        (["rollback", "--to", "gone.jsonl", "--yes"], ("'gone.jsonl' is neither a finished file", "1 good.jsonl")),
        (["rollback", "--to", "1"], ("no terminal on which to ask", "--yes")),
        (["reset"], ("no terminal on which to ask", "--yes")),
        (["add", "{good}", "--priority", "urgent"], ("no priority 'urgent'", "high, normal, low")),
        (["init"], ("there is already a run in this directory", "onward status")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_use_is_refused(
    arguments: list[str], words: tuple[str, ...], untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong usage ends with status 2 and says what is right."""
    monkeypatch.setenv("ONWARD_RUN", str(untouched))
    monkeypatch.chdir(untouched.parent)  # where `init` would make a run if it were not refused
    good = str(untouched.parent / "good.jsonl")
    assert_refused(onward(*(argument.format(good=good) for argument in arguments)), 2, *words)


@pytest.mark.parametrize(
    "command",
    [["rollback", "--to", "step-0"], ["rebuild", "--without", "1"], ["reset", "--json"]],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("typed", ["n\n", "\n", "yesterday\n", "", "\udcff\n"])
def test_what_destroys_asks_on_a_terminal(command: list[str], typed: str, untouched: Path) -> None:
    """The question names the run; without a yes nothing happens, and stdout stays empty for what a result would be."""
    assert_refused(onward(*command, "--run", untouched, typed=typed), 1, str(untouched), "[y/N]: ", "interrupted")


@pytest.mark.parametrize(("typed", "terminal"), [("y\n", True), (" YES \n", False)])
def test_a_yes_is_enough(run: Path, tmp_path: Path, typed: str, terminal: bool) -> None:
    """On a terminal and through a pipe. Question and result do not mix: stdout has the result alone."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    outcome = onward("rollback", "--to", "step-0", "--json", "--run", copy, typed=typed, terminal=terminal)
    assert (0, "{") == (outcome.status, outcome.out[:1])
    assert 0 == outcome.json["global_step"]
    assert outcome.err.startswith("go back to step-0 and undo every later file of ")


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["add", "x.jsonl"],
        ["status"],
        ["history"],
        ["verify"],
        ["rollback", "--to", "1", "-y"],
        ["reset", "-y"],
    ],
)
def test_a_directory_without_a_run_is_named(command: list[str], tmp_path: Path) -> None:
    """Every command on a directory without a run ends with status 2 and says how to make one; nothing is left."""
    words = ("there is no run in this directory", str(tmp_path), f"onward init {tmp_path}")
    assert_refused(onward(*command, "--run", tmp_path), 2, *words)
    assert [] == list(tmp_path.iterdir())


def test_a_run_by_a_relative_name_in_another_working_directory(
    untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook that moved on is told where no run is; nothing is said to be lost."""
    monkeypatch.chdir(untouched.parent)
    run = Run(untouched.name)
    monkeypatch.chdir(tmp_path)
    for work in (run.status, run.train, run.verify, run.pause):
        with pytest.raises(UsageError, match="there is no run in this directory") as refused:
            work()
        assert str(tmp_path / untouched.name) == refused.value.where


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learnig_rate=1", ("unknown key 'learnig_rate'", "did you mean 'learning_rate'")),
        ("lora.rang=8", ("unknown key 'lora.rang'", "did you mean 'lora.rank'")),
        ("report=1", ("unknown key 'report'",)),
        ("batch_size=two", ("batch_size: 'two'", "integer")),
        ("batch_size=0", ("batch_size: 0", "greater than or equal to 1")),
        ("batch_size=true", ("batch_size: true", "must be a number")),
        ("learning_rate=.nan", ("learning_rate: nan",)),
        ("schedule=cosinus", ("schedule: 'cosinus'", "did you mean 'cosine'")),
        ("schedule=cosine", ("needs total_steps",)),
        ("betas=[0.9]", ("betas",)),
        ("lora.rank=[", ("the value of lora.rank cannot be read", "YAML")),
        ("batch_size", ("'batch_size' is not KEY=VALUE", "--set lora.rank=8")),
        ("model=", ("the model has no name", "--model")),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """`init --set` refuses unknown keys, wrong types and impossible values by key and value, and makes nothing."""
    assert_refused(onward("init", tmp_path / "new", "--set", setting), 2, *words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text.replace("batch_size", "batch"), ("unknown key 'batch'", "did you mean 'batch_size'")),
        (lambda text: text.replace("epochs: 1", "epochs: often"), ("epochs: 'often'", "integer")),
        (lambda text: text.replace("epochs: 1", "epochs: -1"), ("epochs: -1", "greater than or equal to 1")),
        (lambda text: text + "a: [\n", ("cannot be read", "line", "Fix it")),
        (lambda _: "- a\n", ("a config is a mapping of keys to values",)),
        (lambda _: "", ("the config is empty", "Put it back")),
        (lambda _: "!!python/object:os.system x", ("cannot be read",)),
        (lambda _: "\udcff", ("cannot be read", "utf-8")),
        (lambda text: text.replace("seed: 0", "seed: 1"), ("locked", "seed: the run has 0, the config says 1")),
        (lambda text: text.replace("rank: 2", "rank: 4"), ("lora.rank: the run has 2", "onward init NEW_RUN")),
        (lambda _: None, ("the config is missing", "Put it back")),
    ],
    ids=["key", "type", "value", "yaml", "list", "empty", "object", "encoding", "seed", "rank", "missing"],
)  # fmt: skip
def test_an_edited_config_that_makes_no_sense_is_refused(
    edit: Callable[[str], str | None], words: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    """An edit of onward.yaml is refused with file, key and value; with the old text back the run is as it was."""
    config = run / "onward.yaml"
    before, text = snapshot(run), config.read_text()
    edited = edit(text)
    config.unlink() if edited is None else config.write_text(edited, errors="surrogateescape")
    commands = [["train", tiny.write_jsonl(tmp_path / "next.jsonl", tiny.chat_rows(4, seed=7))]]
    if not any("the run has" in word for word in words):  # what was proven does not depend on it
        commands.append(["verify"])
    outcomes = [onward(*command, "--run", run) for command in commands]
    config.write_text(text)
    for outcome in outcomes:
        assert_refused(outcome, 2, "onward.yaml", *words)
    assert before == snapshot(run)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A path without a model is wrong usage, whether it is empty or holds something else; nothing is made."""
    (tmp_path / "folder").mkdir()
    for name, words in (("gone", ("there is no model", "config.json")), ("folder", ("config.json is missing",))):
        assert_refused(onward("init", tmp_path / "new", "--model", tmp_path / name), 2, str(tmp_path / name), *words)
        assert not (tmp_path / "new").exists()
    assert_refused(onward("init", tmp_path / "new", "--model", ""), 2, "the model has no name", "smollm2-135m")
    for option in ("--model", "--adapter", "--set=chat_template"):  # no such user
        words = [f"{option}=~nobody-there/x"] if "=" in option else [option, "~nobody-there/x"]
        assert_refused(onward("init", tmp_path / "new", *words), 2, "~nobody-there/x")
    both = onward("init", tmp_path / "new", "--model", "a", "--set", "model=b")
    assert_refused(both, 2, "the model is given twice", "Give it once")
    both = onward("init", tmp_path / "new", "--run", tmp_path / "other")
    assert_refused(both, 2, "two directories are given for the new run", "Give one of them")


def test_a_length_that_the_model_has_not_learned_is_refused_by_init(tmp_path: Path) -> None:
    """`init` names the key and the way out, makes nothing, and with that way makes the run.

    Texts of the anchor that are too long are refused if they are trained on; if they are only measured, their column
    is blank, and no other.
    """
    tokenizer = tiny.byte_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    for part in (GPT2LMHeadModel(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    words = ["init", tmp_path / "new", "--model", tmp_path / "model"]
    refusal = onward(*words)
    assert_refused(refusal, 2, "max_length is 1024, the model has learned 64 positions", "--set max_length=64")
    assert not (tmp_path / "new").exists()
    words += ["--set", "max_length=64"]
    refusal = onward(*words, "--set", "anchor.weight=0.1")
    assert_refused(refusal, 2, "anchor.tokens is 128, the model has learned 64 positions", "--set anchor.tokens=64")
    assert not (tmp_path / "new").exists()
    assert 0 == onward(*words).status
    rows = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {number}"} for number in range(4)])
    assert 0 == onward("train", rows, "--run", tmp_path / "new").status
    grid = read_grid(RunLayout(tmp_path / "new"))
    assert [None, None] == grid["anchor"]
    assert [True, True] == [loss is not None for (loss,) in grid["loss"]]


def test_what_stands_in_a_directory_is_not_made_over(run: Path, model: Path, tmp_path: Path) -> None:
    """A model without its ledger, and a config that somebody wrote, stay as they are, and the way out is named."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for path in copy.glob("ledger.sqlite3*"):
        path.unlink()
    assert_refused(onward("init", copy), 2, "a model without its ledger", "onward adopt", f"{copy}/current_model")
    assert_refused(onward("init", model, "--model", "x"), 2, "the directory of a model", f"--model {model} makes it")
    written = tmp_path / "new" / "onward.yaml"
    written.parent.mkdir()
    written.write_text(f"model: {model}\nbatch_size: 3\nlora: {{use_dora: true}}\n")
    assert_refused(onward("init", written.parent, "--set", "seed=1"), 2, "already a config", str(written), "Leave the")
    assert [written] == list(written.parent.iterdir())
    made = onward("init", written.parent, "--later", "--json")
    assert (0, 3, True) == (made.status, made.json["config"]["batch_size"], "slower than Onward's" in made.err)


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("tokenizer.json", "", "save_pretrained"),
        ("tokenizer.json", "{}", "save_pretrained"),
        ("tokenizer.json", "no JSON", "save_pretrained"),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}', 'set "eos_token"'),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_by_init(
    name: str, text: str, hint: str, model: Path, tmp_path: Path
) -> None:
    """A base without a usable tokenizer is wrong usage, named by its folder, and nothing is made."""
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / name).write_text(text)
    outcome = onward("init", tmp_path / "new", "--model", broken)
    assert_refused(outcome, 2, "tokenizer", str(broken), hint)
    assert not (tmp_path / "new").exists()


def test_a_model_without_weights_trains_nothing(model: Path, tmp_path: Path) -> None:
    """A folder with a config and no weights is refused by name before a file is taken in."""
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    made = onward("init", tmp_path / "new", "--model", bare)
    outcome = onward("train", tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4)), "--run", tmp_path / "new")
    assert "no weights" in made.err + outcome.err
    assert str(bare) in made.err + outcome.err
    assert "Traceback" not in made.err + outcome.err
    assert 0 != outcome.status
    assert not (tmp_path / "new/current_model").exists()


def test_a_run_cannot_be_made_in_a_file(model: Path, tmp_path: Path) -> None:
    """`init` on a path that is a file, or lies below one, is wrong usage."""
    (tmp_path / "file").write_text("mine")
    for place, word in (("file", "this is a file"), ("file/below", "the run cannot be made")):
        assert_refused(onward("init", tmp_path / place, "--model", model), 2, word, str(tmp_path / place))
    assert "mine" == (tmp_path / "file").read_text()


@pytest.mark.parametrize(
    "command", [["status"], ["history"], ["train"], ["add", "{good}"], ["rollback", "--to", "1", "-y"]]
)
def test_a_ledger_of_garbage_is_not_read_as_an_empty_one(command: list[str], run: Path, tmp_path: Path) -> None:
    """With a ledger that SQLite cannot read every command ends with status 5 and the remedy; the model stays."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "ledger.sqlite3").write_bytes(b"garbage " * 1000)
    weights = (copy / "current_model/adapter_model.safetensors").read_bytes()
    good = str(run.parent / "good.jsonl")
    outcome = onward(*(argument.format(good=good) for argument in command), "--run", copy)
    assert_refused(outcome, 5, "the ledger cannot be read", str(copy / "ledger.sqlite3"), "onward adopt")
    assert weights == (copy / "current_model/adapter_model.safetensors").read_bytes()
    assert_refused(onward("init", copy), 2, "there is already a run in this directory")


def test_an_empty_ledger_next_to_a_model_names_the_way_out(run: Path, tmp_path: Path) -> None:
    """A ledger that holds nothing is refused with the command that makes a run of the model, and that command works."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for path in copy.glob("ledger.sqlite3*"):
        path.unlink()
    (copy / "ledger.sqlite3").touch()
    outcome = onward("train", "--run", copy)
    assert_refused(outcome, 5, "the ledger is empty", "onward adopt")
    words = shlex.split(outcome.err.partition("onward adopt ")[2])
    assert [str(copy / "current_model/checkpoint-2"), "--run", "NEW_RUN"] == words
    model = read_config(copy / "onward.yaml").model
    assert 0 == onward("adopt", words[0], "--run", tmp_path / "new", "--model", model).status
    assert 2 == onward("status", "--run", tmp_path / "new", "--json").json["global_step"]


def test_a_second_process_is_turned_away_at_once(untouched: Path) -> None:
    """While one process owns the run, another that wants to train ends with status 4 and the name of the owner."""
    with RunLock(untouched / ".lock"):
        turned_away = [onward_process("train", "--run", untouched)]
        turned_away += [
            onward(*command, "--run", untouched) for command in (["rollback", "--to", "1", "-y"], ["reset", "-y"])
        ]
        for outcome in turned_away:
            assert_refused(outcome, 4, "another process owns this run", f"pid {os.getpid()}", "onward status")
        assert 0 == onward_process("status", "--run", untouched).status


@pytest.mark.slow
def test_a_real_process_refuses_the_same_way(untouched: Path, tmp_path: Path) -> None:
    """The exit statuses and lines are those of `python -m onward`, traceback-free."""
    bad = tmp_path / "real.jsonl"
    bad.write_bytes(b'{"prompt": "one", "completion": "two"}\noops\n')
    assert_refused(onward_process("train", bad, "--run", untouched), 3, "real.jsonl, line 2: not valid JSON")
    assert_refused(onward_process("learn"), 2, "No such command 'learn'")
    assert_refused(onward_process("status", cwd=tmp_path), 2, "there is no run in this directory")


@pytest.mark.parametrize("arguments", [("status", "{}"), ("{}",), ("status", "--{}")])
def test_wrong_arguments_are_shown_without_control_characters(arguments: tuple[str, ...]) -> None:
    """What a shell's pattern made of a file's name is printable where the command line refuses it, too."""
    outcome = onward(*(word.format("\u202ea\x1b[31m") for word in arguments))
    assert_refused(outcome, 2, "[31m")
    assert outcome.err.replace("\n", "").isprintable()
