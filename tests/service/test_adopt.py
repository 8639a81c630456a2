"""A checkpoint of transformers' Trainer becomes a run: its weights, moments and step go on."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import stock
import tiny
import yaml
from adopting import RATE, SETTINGS, assert_went_on, change
from commands import onward
from safetensors.torch import load_file
from states import read_state
from stock import STEPS, Saved
from transformers import AutoTokenizer

from onward import Run
from onward.data.tokenizer import load_tokenizer_state
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.service.state.adopt import adopt
from onward.store.ledger import Ledger


def test_weights_and_moments_are_the_trainers(
    by_method: dict[str, Saved], method: str, model: Path, tmp_path: Path
) -> None:
    """Step, every weight and every Adam moment of the new run are the stock Trainer's, by parameter name."""
    Run.adopt(by_method[method].folder, tmp_path / "run", str(model))
    state = stock.open_state(tmp_path / "run")
    assert (STEPS, STEPS, 0) == (state.step, state.view().adam_step(), state.counters.adam_origin)
    stock.assert_equal(stock.trained(by_method[method].model), stock.trained(state.model))
    stock.assert_equal(by_method[method].moments, stock.moments(state.model, state.optimizer))


def test_the_checkpoint_is_only_read(by_method: dict[str, Saved], model: Path, tmp_path: Path, method: str) -> None:
    """Adoption changes no byte of the checkpoint and leaves nothing in it."""
    before = {path.name: path.read_bytes() for path in by_method[method].folder.iterdir()}
    Run.adopt(by_method[method].folder, tmp_path / "run", str(model))
    assert before == {path.name: path.read_bytes() for path in by_method[method].folder.iterdir()}


def test_the_config_is_the_trainers(by_method: dict[str, Saved], method: str, model: Path, tmp_path: Path) -> None:
    """Learning rate, betas, weight decay and the adapter's shape are read from the checkpoint, without a new warmup."""
    config = Run.adopt(by_method[method].folder, tmp_path / "run", str(model)).config
    assert (method, str(model)) == (config.method, config.model)
    assert (RATE, 0, (0.85, 0.97)) == (config.learning_rate, config.warmup_steps, config.betas)
    assert 0.1 == config.weight_decay
    if method == "lora":
        assert (4, 8, 0.1) == (config.lora.rank, config.lora.alpha, config.lora.dropout)
        assert {"q_proj", "v_proj"} == set(config.lora.targets)


def test_settings_win_over_the_checkpoint(by_method: dict[str, Saved], model: Path, tmp_path: Path) -> None:
    """Settings given on top of the checkpoint's values hold from the first step on."""
    settings = {"learning_rate": 1e-4, "lora.dropout": 0.0, "batch_size": 2}
    config = Run.adopt(by_method["lora"].folder, tmp_path / "run", str(model), settings=settings).config
    assert (1e-4, 0.0, 2, 0.1) == (config.learning_rate, config.lora.dropout, config.batch_size, config.weight_decay)


def test_training_goes_on_from_the_trainers_step(
    by_method: dict[str, Saved], method: str, model: Path, tmp_path: Path, file: Path
) -> None:
    """The next file continues the global step and Adam's counter, and the run verifies, by replay too."""
    run = Run.adopt(by_method[method].folder, tmp_path / "run", str(model), settings=SETTINGS)
    assert STEPS == run.status()["global_step"]
    assert run.verify().ok
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_moments_younger_than_the_run_stay_so(copied: Callable[[str], Path], tmp_path: Path, file: Path) -> None:
    """Where the Trainer once restarted its optimizer, step and Adam's counter both go on, their distance kept."""
    folder = copied("lora")
    change("trainer_state.json", lambda values: values.update(global_step=STEPS + 4))(folder)
    run = Run.adopt(folder, tmp_path / "run", settings=SETTINGS)
    assert 4 == stock.open_state(tmp_path / "run").counters.adam_origin
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS + 4, adam=STEPS)


@pytest.mark.parametrize("named", ["by model", "by the checkpoint"])
def test_a_full_run_outlives_the_trainers_checkpoint(
    named: str, copied: Callable[[str], Path], model: Path, tmp_path: Path, file: Path
) -> None:
    """A Trainer rotates its checkpoints away; the run has what it needs, verifies and trains on."""
    folder = copied("full")
    run = Run.adopt(folder, tmp_path / "run", str(model) if named == "by model" else None, settings=SETTINGS)
    shutil.rmtree(folder)
    assert run.verify().ok
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_a_full_run_outlives_a_trainer_that_writes_its_checkpoint_again(
    copied: Callable[[str], Path], tmp_path: Path, file: Path
) -> None:
    """The run's base is a copy: bytes written into the same checkpoint later do not reach it."""
    folder = copied("full")
    run = Run.adopt(folder, tmp_path / "run", settings=SETTINGS)
    for path in folder.iterdir():
        with path.open("r+b") as stream:
            stream.write(b"something else")
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_a_lora_run_needs_no_checkpoint_afterwards(
    copied: Callable[[str], Path], tmp_path: Path, file: Path, model: Path
) -> None:
    """The base that the adapter names is found without `--model`, and the checkpoint may go."""
    folder = copied("lora")
    run = Run.adopt(folder, tmp_path / "run", settings=SETTINGS)
    assert str(model) == run.config.model
    shutil.rmtree(folder)
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_a_base_named_relatively_is_found_from_anywhere(
    by_method: dict[str, Saved], model: Path, tmp_path: Path, file: Path
) -> None:
    """The run keeps the base model's absolute path, so that it trains from any directory."""
    with contextlib.chdir(model.parent):
        Run.adopt(by_method["lora"].folder, tmp_path / "run", model.name, settings=SETTINGS)
    Run(tmp_path / "run").train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_the_tokenizer_is_the_checkpoints(copied: Callable[[str], Path], model: Path, tmp_path: Path) -> None:
    """Chat templates that were trained with, also one for chats with tools, win over the base model's."""
    folder = copied("full")
    tokenizer = tiny.byte_tokenizer()
    own = tiny.CHATML.replace("<|im_end|>", "<|im_end|> ")
    tokenizer.chat_template = {"default": own, "tool_use": "{{ tools | tojson }}" + own}
    tokenizer.save_pretrained(folder)
    Run.adopt(folder, tmp_path / "run", str(model))
    kept = AutoTokenizer.from_pretrained(tmp_path / "run/tokenizer")
    written = AutoTokenizer.from_pretrained(tmp_path / "run/current_model")
    assert tokenizer.chat_template == kept.chat_template == written.chat_template


def test_the_command_line_adopts(by_method: dict[str, Saved], program: Path, model: Path, tmp_path: Path) -> None:
    """`onward adopt` exits with 0, prints the run's status as JSON and names the next command."""
    words = ["adopt", by_method["lora"].folder, "--run", tmp_path / "run", "--model", model, "--json"]
    command = [program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (0, STEPS) == (done.returncode, json.loads(done.stdout)["global_step"])
    (stored,) = (tmp_path / "run/cache/tokenizer").iterdir()
    assert load_tokenizer_state(stored) is not None
    lines = [line.partition(" ")[0] for line in done.stderr.splitlines()]
    assert ["from", "from", "from", "from", "defaults,", "learning", "adopted"] == lines
    assert f"adopted step {STEPS}" in done.stderr
    assert (RATE, "lora") == (Run(tmp_path / "run").config.learning_rate, Run(tmp_path / "run").config.method)


def test_the_run_on_disk_is_a_run(by_method: dict[str, Saved], tmp_path: Path) -> None:
    """An adopted full run carries its base: config and files name no place outside of it."""
    Run.adopt(by_method["full"].folder, tmp_path / "run")
    base = tmp_path / "run/base"
    assert "base" == yaml.safe_load((tmp_path / "run/onward.yaml").read_text())["model"]
    stock.assert_equal(load_file(by_method["full"].folder / "model.safetensors"), load_file(base / "model.safetensors"))
    assert [] == [path for path in base.iterdir() if path.suffix in (".pt", ".pth")]
    assert [] == list((tmp_path / "run").rglob(".tmp-*"))


def test_an_interrupted_adoption_is_made_again(by_method: dict[str, Saved], tmp_path: Path) -> None:
    """What it left is removed, as its unfinished ledger shows; what somebody else put beside it stays."""
    layout = RunLayout(tmp_path / "run")
    left, mine = layout.current / ".tmp-checkpoint-40", layout.current / ".tmp-checkpoint-7"
    for folder in (left, mine):
        folder.mkdir(parents=True)
        (folder / "notes").write_text("some")
    with Ledger(tmp_path / "run/.tmp-ledger.sqlite3", create=True) as begun:
        begun.begin_checkpoint(step=40, file_id=None, boundary=1, state_digest="", basis="")
    assert Run.adopt(by_method["lora"].folder, layout.root).verify().ok
    assert [mine] == list(layout.root.rglob(".tmp-*"))
    assert "some" == (mine / "notes").read_text()


def test_reset_is_back_at_the_adopted_step(
    by_method: dict[str, Saved], method: str, model: Path, file: Path, tmp_path: Path
) -> None:
    """The adopted beginning is always kept, and `reset` goes back to it: all is as it was the first time."""
    settings = {**SETTINGS, "keep_boundaries": 1, "keep_days": 0}
    run = Run.adopt(by_method[method].folder, tmp_path / "run", str(model), settings=settings)
    run.train(file)
    first = read_state(run.layout.root)
    for number in (1, 2):
        run.train(tiny.write_jsonl(tmp_path / f"{number}.jsonl", tiny.chat_rows(4, seed=number)))
    assert [STEPS + 7, STEPS + 6, STEPS] == [int(path.name[5:]) for path in run.layout.restore_points()]
    back = onward("reset", "--yes", "--run", run.layout.root)
    assert f"back at the adopted step {STEPS}; undone: more.jsonl, 1.jsonl, 2.jsonl. The" in back.err
    state = stock.open_state(run.layout.root)
    stock.assert_equal(stock.trained(by_method[method].model), stock.trained(state.model))
    stock.assert_equal(by_method[method].moments, stock.moments(state.model, state.optimizer))
    run.train(file)
    again = read_state(run.layout.root)
    stock.assert_equal(first["tensors"], again["tensors"])
    assert run.verify(deep=True).ok


def test_reset_without_the_adopted_state_is_refused(
    by_method: dict[str, Saved], model: Path, file: Path, tmp_path: Path
) -> None:
    """Where the adopted state is gone, nothing is forgotten, and the ways out are named."""
    run = Run.adopt(by_method["lora"].folder, tmp_path / "run", str(model), settings=SETTINGS)
    run.train(file)
    shutil.rmtree(run.layout.boundary(STEPS))
    with pytest.raises(UsageError, match="no longer kept") as caught:
        run.reset()
    assert f"onward rollback --to step:{STEPS + 5}" in str(caught.value.hint)
    assert "onward adopt CHECKPOINT" in str(caught.value.hint)
    assert STEPS + 5 == run.status()["global_step"]
    assert run.verify().ok


@pytest.mark.parametrize("is_old", [False, True], ids=["now", "by an earlier release"])
def test_an_adopted_run_can_be_moved(is_old: bool, by_method: dict[str, Saved], file: Path, tmp_path: Path) -> None:
    """A run that carries its base is whole wherever it is, also where its config names the base by an old path."""
    root = tmp_path / "run"
    run = Run.adopt(by_method["full"].folder, root, settings=SETTINGS)
    if is_old:
        config = run.layout.config
        config.write_text(re.sub("^model: .*$", f"model: {root / 'base'}", config.read_text(), flags=re.MULTILINE))
        assert str(root / "base") == Run(root).config.model
    moved = root.rename(tmp_path / "moved")
    Run(moved).train(file)
    assert_went_on(moved, STEPS)


def test_adoption_tells_what_it_took_over(by_method: dict[str, Saved], model: Path, tmp_path: Path) -> None:
    """`adopt` says what came from the checkpoint, what was set by hand, what is new and what is unknown."""
    layout = RunLayout(tmp_path / "run")
    settings = {"max_length": 128, "lora": {"dropout": 0.2}}
    lines = adopt(by_method["lora"].folder, layout, str(model), settings, lambda _: None)
    assert lines[0].startswith("from adapter_config.json: method lora, lora.rank 4, lora.alpha 8, lora.targets ")
    assert (
        "from training_args.bin: batch_size 4 (4 rows per device, 1 accumulated, 1 device), gradient_accumulation 1, "
        "max_grad_norm 1, seed 42" == lines[1]
    )
    assert (
        "from schedule of the Trainer (linear): learning_rate 0.003, warmup_steps 0, schedule_offset 1, "
        "total_steps 40, min_learning_rate 0, schedule linear" == lines[2]
    )
    assert "from optimizer.pt: weight_decay 0.1, betas 0.85 0.97, eps 1e-08" == lines[3]
    assert "set by you: max_length 128, lora.dropout 0.2" == lines[4]
    assert (
        "defaults, for training_args.bin does not say: epochs 1; onward.yaml changes them before the first" in lines[5]
    )
    assert lines[6].startswith("learning rates (schedule linear): step 6: 0.002625 (the Trainer's: 0.002625), step 7: ")
    assert 7 == len(lines)
