"""A checkpoint of transformers' Trainer becomes a run: its weights, moments and step go on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import stock
import tiny
import torch
import yaml
from commands import onward
from peft import PromptTuningConfig, get_peft_model
from runs import new_run
from safetensors.torch import load_file
from states import read_state
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from onward import Run
from onward.data.tokenizer import load_tokenizer_state
from onward.errors import ConfigError, DamagedState, ModelError, OnwardError, UsageError
from onward.layout import MANIFEST, RunLayout
from onward.service.state.adopt import adopt
from onward.service.state.adopted_config import read_adopted
from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import write_checkpoint
from onward.training.foreign.scaler import read_scale
from onward.training.model.adapter import ADAPTER_WEIGHTS

METHODS = ("lora", "full")
STEPS, HORIZON, RATE = 5, 40, 3e-3
OPTIMIZER: dict[str, Any] = {"learning_rate": RATE, "adam_beta1": 0.85, "adam_beta2": 0.97, "weight_decay": 0.1}
SETTINGS: dict[str, Any] = {"evaluation": {"share": 0}, "batch_size": 4, "max_length": 128}


@dataclass(frozen=True)
class Saved:
    """A stock checkpoint and what its Trainer held when it was saved."""

    folder: Path
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def train_stock(model: Any, output: Path, **settings: Any) -> Saved:
    """Train a few steps with the stock Trainer, its last one saved."""
    steps = settings.pop("steps", STEPS)
    stop: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(steps)]}
    trainer = stock.trainer(model, output, **{**OPTIMIZER, **stop, **settings})
    trainer.train()
    return Saved(output / f"checkpoint-{steps}", stock.trained(model), stock.moments(model, trainer.optimizer))


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """One stock checkpoint per method; the Trainer of the full one knew the tokenizer, as TRL's does."""
    root = tmp_path_factory.mktemp("stock")
    whole = AutoModelForCausalLM.from_pretrained(model)
    return {
        "lora": train_stock(stock.lora_model(model), root / "lora"),
        "full": train_stock(whole, root / "full", processing_class=tiny.byte_tokenizer()),
    }


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Every kind of trained weights."""
    return request.param


@pytest.fixture
def checkpoint(saved: dict[str, Saved], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that gives a test its own copy of a stock checkpoint."""
    return lambda method: shutil.copytree(saved[method].folder, tmp_path / method / f"checkpoint-{STEPS}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A training file of five steps."""
    return tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(19, seed=3))


def assert_went_on(run: Path, first: int, *, adam: int | None = None) -> None:
    """The run stands five steps after `first`, Adam's counters too, and proves itself, also by training again."""
    state = read_state(run)
    assert (first + 5, {(first if adam is None else adam) + 5}) == (state["global_step"], state["adam"])
    opened = Run(run)
    proof = opened.verify(deep=True)
    assert [] == [check for check in proof.checks if not check.ok]
    assert opened.verify().ok
    (entry,) = opened.history()
    assert (first + 1, first + 5, "done") == (entry["first_step"], entry["last_step"], entry["state"])


def test_weights_and_moments_are_the_trainers(
    saved: dict[str, Saved], method: str, model: Path, tmp_path: Path
) -> None:
    """Step, every weight and every Adam moment of the new run are the stock Trainer's, by parameter name."""
    Run.adopt(saved[method].folder, tmp_path / "run", str(model))
    state = stock.open_state(tmp_path / "run")
    assert (STEPS, STEPS, 0) == (state.step, state.view().adam_step(), state.counters.adam_origin)
    stock.assert_equal(saved[method].weights, stock.trained(state.model))
    stock.assert_equal(saved[method].moments, stock.moments(state.model, state.optimizer))


def test_the_checkpoint_is_only_read(saved: dict[str, Saved], model: Path, tmp_path: Path, method: str) -> None:
    """Adoption changes no byte of the checkpoint and leaves nothing in it."""
    before = {path.name: path.read_bytes() for path in saved[method].folder.iterdir()}
    Run.adopt(saved[method].folder, tmp_path / "run", str(model))
    assert before == {path.name: path.read_bytes() for path in saved[method].folder.iterdir()}


def test_the_config_is_the_trainers(saved: dict[str, Saved], method: str, model: Path, tmp_path: Path) -> None:
    """Learning rate, betas, weight decay and the adapter's shape are read from the checkpoint, without a new warmup."""
    config = Run.adopt(saved[method].folder, tmp_path / "run", str(model)).config
    assert (method, str(model)) == (config.method, config.model)
    assert (RATE, 0, (0.85, 0.97)) == (config.learning_rate, config.warmup_steps, config.betas)
    assert 0.1 == config.weight_decay
    if method == "lora":
        assert (4, 8, 0.1) == (config.lora.rank, config.lora.alpha, config.lora.dropout)
        assert {"q_proj", "v_proj"} == set(config.lora.targets)


def test_settings_win_over_the_checkpoint(saved: dict[str, Saved], model: Path, tmp_path: Path) -> None:
    """Settings given on top of the checkpoint's values hold from the first step on."""
    settings = {"learning_rate": 1e-4, "lora.dropout": 0.0, "batch_size": 2}
    config = Run.adopt(saved["lora"].folder, tmp_path / "run", str(model), settings=settings).config
    assert (1e-4, 0.0, 2, 0.1) == (config.learning_rate, config.lora.dropout, config.batch_size, config.weight_decay)


def test_training_goes_on_from_the_trainers_step(
    saved: dict[str, Saved], method: str, model: Path, tmp_path: Path, file: Path
) -> None:
    """The next file continues the global step and Adam's counter, and the run verifies, by replay too."""
    run = Run.adopt(saved[method].folder, tmp_path / "run", str(model), settings=SETTINGS)
    assert STEPS == run.status()["global_step"]
    assert run.verify().ok
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_moments_younger_than_the_run_stay_so(checkpoint: Callable[[str], Path], tmp_path: Path, file: Path) -> None:
    """Where the Trainer once restarted its optimizer, step and Adam's counter both go on, their distance kept."""
    folder = checkpoint("lora")
    change("trainer_state.json", lambda values: values.update(global_step=STEPS + 4))(folder)
    run = Run.adopt(folder, tmp_path / "run", settings=SETTINGS)
    assert 4 == stock.open_state(tmp_path / "run").counters.adam_origin
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS + 4, adam=STEPS)


def test_adopting_onwards_own_checkpoint_continues_it_exactly(model: Path, tmp_path: Path, file: Path) -> None:
    """A run made from Onward's own checkpoint trains the next file to the state that the first run reaches.

    All of its config is in the checkpoint: nothing has to be set again, and its tokens and chat template go on.
    """
    template = tmp_path / "own.jinja"
    template.write_text(f"<|a|>{AutoTokenizer.from_pretrained(model).chat_template}")
    first = tiny.write_jsonl(tmp_path / "first.jsonl", tiny.chat_rows(20, seed=4))
    settings: dict[str, Any] = {**SETTINGS, "warmup_steps": 8, "learning_rate": RATE, "eps": 1e-6, "seed": 3}
    settings |= {"tokens": ["<|a|>"], "chat_template": str(template), "lora": {"rank": 4, "dropout": 0.1}}
    old = new_run(tmp_path / "old", model, **settings)
    template.unlink()
    old.train(first)
    new = Run.adopt(tmp_path / "old/current_model/checkpoint-5", tmp_path / "new")
    old.train(file)
    new.train(file)
    expected, actual = read_state(tmp_path / "old"), read_state(tmp_path / "new")
    stock.assert_equal(expected.pop("tensors"), actual.pop("tensors"))
    assert expected == actual
    assert Run(tmp_path / "new").verify().ok


def test_a_base_in_4_bits_stays_so(model: Path, tmp_path: Path) -> None:
    """A run's own checkpoint tells whether its base was, unlike a Trainer's; either way can be set."""
    contents = checkpoints.make_contents(model)
    config = contents.config.model_copy(update={"method": "qlora"})
    write_checkpoint(tmp_path / "checkpoint-1", replace(contents, config=config))
    settings: list[dict[str, Any]] = [{}, {"method": "lora"}, {"method": "qlora"}]
    found = [read_adopted(tmp_path / "checkpoint-1", None, each, fresh=False) for each in settings]
    assert ["qlora", "lora", "qlora"] == [adopted.config.method for adopted in found]


@pytest.mark.parametrize(("name", "fresh"), [(ADAPTER_WEIGHTS, True), ("optimizer.pt", False), (MANIFEST, False)])
def test_onwards_own_checkpoint_is_adopted_as_it_was_written(
    name: str, fresh: bool, model: Path, tmp_path: Path
) -> None:
    """A byte that has changed since is damage, not another state, and so is a manifest that ends too early.

    What is not read may be missing.
    """
    folder = tmp_path / "checkpoint-1"
    write_checkpoint(folder, checkpoints.make_contents(model))
    for other in ("rng_state.pth", "scheduler.pt", "training_args.bin"):
        (folder / other).unlink()
    assert 2 == read_adopted(folder, None, {}, fresh=fresh).config.lora.rank
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DamagedState, match=f"it has changed since: {name} was changed") as caught:
        read_adopted(folder, None, {}, fresh=fresh)
    assert f"rm {folder / MANIFEST}" in str(caught.value.hint)


def test_another_base_than_onward_recorded_is_refused_or_told(
    saved: dict[str, Saved], model: Path, tmp_path: Path
) -> None:
    """An adapter of Onward's own is adopted on the base that it was trained on; on another one if that is named."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    Run.adopt(saved["lora"].folder, tmp_path / "old", str(base), settings=SETTINGS)
    checkpoint = tmp_path / f"old/current_model/checkpoint-{STEPS}"
    values = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match="not the one on which this adapter was trained") as caught:
        Run.adopt(checkpoint, tmp_path / "new")
    assert f"onward init NEW_RUN --model {base} --adapter {checkpoint}" in str(caught.value.hint)
    told: list[str] = []
    Run.adopt(checkpoint, tmp_path / "new", str(base), report=told.append)
    assert 1 == sum("not the one on which this adapter was trained" in line for line in told)


def test_a_base_that_init_refuses_is_refused(saved: dict[str, Saved], model: Path, tmp_path: Path) -> None:
    """An adapter on a base that was saved in 4 bits is adopted only as what it is, as `init` does."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    values = json.loads((base / "config.json").read_bytes())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="its weights are quantized") as caught:
        Run.adopt(saved["lora"].folder, tmp_path / "run", str(base))
    assert "--set method=qlora" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("named", ["by model", "by the checkpoint"])
def test_a_full_run_outlives_the_trainers_checkpoint(
    named: str, checkpoint: Callable[[str], Path], model: Path, tmp_path: Path, file: Path
) -> None:
    """A Trainer rotates its checkpoints away; the run has what it needs, verifies and trains on."""
    folder = checkpoint("full")
    run = Run.adopt(folder, tmp_path / "run", str(model) if named == "by model" else None, settings=SETTINGS)
    shutil.rmtree(folder)
    assert run.verify().ok
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_a_full_run_outlives_a_trainer_that_writes_its_checkpoint_again(
    checkpoint: Callable[[str], Path], tmp_path: Path, file: Path
) -> None:
    """The run's base is a copy: bytes written into the same checkpoint later do not reach it."""
    folder = checkpoint("full")
    run = Run.adopt(folder, tmp_path / "run", settings=SETTINGS)
    for path in folder.iterdir():
        with path.open("r+b") as stream:
            stream.write(b"something else")
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_a_lora_run_needs_no_checkpoint_afterwards(
    checkpoint: Callable[[str], Path], tmp_path: Path, file: Path, model: Path
) -> None:
    """The base that the adapter names is found without `--model`, and the checkpoint may go."""
    folder = checkpoint("lora")
    run = Run.adopt(folder, tmp_path / "run", settings=SETTINGS)
    assert str(model) == run.config.model
    shutil.rmtree(folder)
    run.train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_a_base_named_relatively_is_found_from_anywhere(
    saved: dict[str, Saved], model: Path, tmp_path: Path, file: Path
) -> None:
    """The run keeps the base model's absolute path, so that it trains from any directory."""
    with contextlib.chdir(model.parent):
        Run.adopt(saved["lora"].folder, tmp_path / "run", model.name, settings=SETTINGS)
    Run(tmp_path / "run").train(file)
    assert_went_on(tmp_path / "run", STEPS)


def test_the_tokenizer_is_the_checkpoints(checkpoint: Callable[[str], Path], model: Path, tmp_path: Path) -> None:
    """Chat templates that were trained with, also one for chats with tools, win over the base model's."""
    folder = checkpoint("full")
    tokenizer = tiny.byte_tokenizer()
    own = tiny.CHATML.replace("<|im_end|>", "<|im_end|> ")
    tokenizer.chat_template = {"default": own, "tool_use": "{{ tools | tojson }}" + own}
    tokenizer.save_pretrained(folder)
    Run.adopt(folder, tmp_path / "run", str(model))
    kept = AutoTokenizer.from_pretrained(tmp_path / "run/tokenizer")
    written = AutoTokenizer.from_pretrained(tmp_path / "run/current_model")
    assert tokenizer.chat_template == kept.chat_template == written.chat_template


def test_the_command_line_adopts(saved: dict[str, Saved], program: Path, model: Path, tmp_path: Path) -> None:
    """`onward adopt` exits with 0, prints the run's status as JSON and names the next command."""
    words = ["adopt", saved["lora"].folder, "--run", tmp_path / "run", "--model", model, "--json"]
    command = [program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (0, STEPS) == (done.returncode, json.loads(done.stdout)["global_step"])
    (stored,) = (tmp_path / "run/cache/tokenizer").iterdir()
    assert load_tokenizer_state(stored) is not None
    lines = [line.partition(" ")[0] for line in done.stderr.splitlines()]
    assert ["from", "from", "from", "from", "defaults,", "learning", "adopted"] == lines
    assert f"adopted step {STEPS}" in done.stderr
    assert (RATE, "lora") == (Run(tmp_path / "run").config.learning_rate, Run(tmp_path / "run").config.method)


def remove(name: str) -> Callable[[Path], None]:
    """Return a function that removes a file of a checkpoint."""
    return lambda folder: (folder / name).unlink()


def optimizer_of(kind: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Path], None]:
    """Return a function that puts another optimizer's state into a checkpoint."""

    def put(folder: Path) -> None:
        parameters: Any = [nn.Parameter(torch.ones(3)) for _ in torch.load(folder / "optimizer.pt")["state"]]
        optimizer = kind(parameters)
        torch.cat(parameters).sum().backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    return put


def change(name: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Return a function that edits a value that `torch.save` or JSON wrote."""

    def put(folder: Path) -> None:
        path = folder / name
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            edit(values)
            path.write_text(json.dumps(values))
            return
        values = torch.load(path, weights_only=True)
        edit(values)
        torch.save(values, path)

    return put


def grow_moments(values: Any) -> None:
    """Make the moments those of a model with longer weights; the names and their number stay."""
    for entry in values["state"].values():
        entry["exp_avg"] = torch.cat([entry["exp_avg"]] * 2)
        entry["exp_avg_sq"] = torch.cat([entry["exp_avg_sq"]] * 2)


def lose_half(values: Any) -> None:
    """Make the state that of a model with fewer weights."""
    group = values["param_groups"][0]
    group["params"] = group["params"][::2]


def forget_one(values: Any) -> None:
    """Lose the moments of one parameter."""
    values["state"].popitem()


def lag_behind(values: Any) -> None:
    """Let one of Adam's counters lag behind the others."""
    values["state"][0]["step"] -= 1


REFUSALS: dict[str, tuple[Callable[[Path], None], type[OnwardError], str]] = {
    "no optimizer.pt": (remove("optimizer.pt"), UsageError, "no optimizer.pt"),
    "no trainer_state.json": (remove("trainer_state.json"), UsageError, "trainer_state.json cannot be read"),
    "torn trainer_state.json": (
        lambda folder: os.truncate(folder / "trainer_state.json", 20), UsageError, "trainer_state.json cannot be read"
    ),
    "torn optimizer.pt": (lambda folder: os.truncate(folder / "optimizer.pt", 900), DamagedState, "is damaged"),
    "SGD": (optimizer_of(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)), UsageError, "not that of AdamW"),
    "Adafactor": (optimizer_of(lambda p: torch.optim.Adafactor(p)), UsageError, "not that of AdamW"),
    "Adamax": (optimizer_of(lambda p: torch.optim.Adamax(p)), UsageError, "not that of AdamW"),
    "moments of other shapes": (change("optimizer.pt", grow_moments), DamagedState, "has shape"),
    "fewer parameters": (change("optimizer.pt", lose_half), DamagedState, "parameter groups"),
    "a parameter without moments": (change("optimizer.pt", forget_one), DamagedState, "no AdamW moments for"),
    "counters that disagree": (change("optimizer.pt", lag_behind), DamagedState, "Adam's counters disagree"),
    "more Adam steps than steps": (
        change("trainer_state.json", lambda v: v.update(global_step=STEPS - 1)), DamagedState, f"Adam counts {STEPS}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused(
    case: str, method: str, checkpoint: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """State that is missing, torn, of another optimizer or of another model is refused before anything is made."""
    damage, kind, reason = REFUSALS[case]
    folder = checkpoint(method)
    damage(folder)
    with pytest.raises(kind) as caught:
        Run.adopt(folder, tmp_path / "run", str(model))
    assert reason in caught.value.what
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_torn_file_is_damage_and_no_fault_of_the_disk(
    name: str, share: float, checkpoint: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """Wherever a file ends too early, the refusal says that it is damaged and what can be adopted in its place."""
    folder = checkpoint("lora")
    os.truncate(folder / name, int(share * (folder / name).stat().st_size))
    with pytest.raises(DamagedState) as caught:
        Run.adopt(folder, tmp_path / "run", str(model))
    assert "onward train" not in str(caught.value.hint)
    assert re.search("onward adopt .* --fresh-moments|another checkpoint", str(caught.value.hint))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_torn_loss_scale_is_damage(share: float, tmp_path: Path) -> None:
    """It is not blamed on the disk either."""
    torch.save({"scale": torch.zeros(20_000)}, tmp_path / "scaler.pt")
    os.truncate(tmp_path / "scaler.pt", int(share * (tmp_path / "scaler.pt").stat().st_size))
    with pytest.raises(DamagedState, match="not the state of a GradScaler"):
        read_scale(tmp_path)


@pytest.mark.parametrize("inner", ["", "current_model"])
def test_a_run_is_no_checkpoint(inner: str, model: Path, tmp_path: Path) -> None:
    """Who names a run, or its current_model, is told its checkpoint; following the advice works."""
    run = new_run(tmp_path / "run", model)
    run.train(tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(2)))
    with pytest.raises(UsageError, match="not a checkpoint") as caught:
        Run.adopt(tmp_path / "run" / inner, tmp_path / "new", str(model))
    named = re.search("onward adopt (.*) --run NEW_RUN", str(caught.value.hint))
    assert named is not None
    Run.adopt(Path(named[1]), tmp_path / "new", str(model))
    assert run.status()["global_step"] == Run(tmp_path / "new").status()["global_step"]


def test_an_optimizer_of_a_larger_model_is_refused(model: Path, saved: dict[str, Saved], tmp_path: Path) -> None:
    """The moments of a LoRA twice as wide do not enter this one's run."""
    wide = train_stock(stock.lora_model(model, r=8), tmp_path / "wide", steps=1)
    folder = shutil.copytree(saved["lora"].folder, tmp_path / f"checkpoint-{STEPS}")
    shutil.copyfile(wide.folder / "optimizer.pt", folder / "optimizer.pt")
    with pytest.raises(DamagedState, match="has shape"):
        Run.adopt(folder, tmp_path / "run", str(model))
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_is_no_lora_is_refused(model: Path, tmp_path: Path) -> None:
    """Prompt tuning is refused: Onward cannot train it."""
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), prompts)
    folder = train_stock(prompted, tmp_path / "prompts").folder
    with pytest.raises(ModelError, match="adapters of type PROMPT_TUNING"):
        Run.adopt(folder, tmp_path / "run", str(model))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_refused(
    name: str, checkpoint: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """Neither half an adapter config nor missing weights become a run."""
    folder = checkpoint("lora")
    if name.endswith(".json"):
        os.truncate(folder / name, 10)
    else:
        (folder / name).unlink()
    with pytest.raises(OnwardError, match=name):
        Run.adopt(folder, tmp_path / "run", str(model))
    assert not (tmp_path / "run").exists()


def test_a_full_checkpoint_without_a_tokenizer_needs_a_base(
    checkpoint: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """A Trainer that was given no tokenizer saves none; the refusal names the option, which works."""
    folder = checkpoint("full")
    for path in (*folder.glob("tokenizer*"), folder / "chat_template.jinja"):
        path.unlink()
    with pytest.raises(UsageError, match="no tokenizer") as caught:
        Run.adopt(folder, tmp_path / "run")
    assert "--model" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()
    assert STEPS == Run.adopt(folder, tmp_path / "run", str(model)).status()["global_step"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lora", {"method": "full"}),
        ("full", {"method": "lora"}),
        ("lora", {"lora.rank": 8, "lora.alpha": 2}),
        ("full", {"tokens": ["<|a|>"]}),
        ("lora", {"adapter": "adapter"}),
    ],
)
def test_settings_cannot_change_the_shape(
    kind: str, settings: dict[str, Any], saved: dict[str, Saved], model: Path, tmp_path: Path
) -> None:
    """Settings cannot contradict the checkpoint's weights."""
    with pytest.raises(ConfigError, match="a different shape"):
        Run.adopt(saved[kind].folder, tmp_path / "run", str(model), settings=settings)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_touched(saved: dict[str, Saved], model: Path, tmp_path: Path) -> None:
    """A directory that has a run is refused, and every file of it stays as it was."""
    new_run(tmp_path / "run", model)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="there is already a run in this directory"):
        Run.adopt(saved["lora"].folder, tmp_path / "run", str(model))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_the_trainers_output_directory_is_not_written_over(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A directory with a model's config.json is refused as a run; the model stays readable."""
    output = checkpoint("full").parent
    shutil.copyfile(output / f"checkpoint-{STEPS}/config.json", output / "config.json")
    with pytest.raises(UsageError, match="this is the directory of a model"):
        Run.adopt(output / f"checkpoint-{STEPS}", output)
    assert "llama" == json.loads((output / "config.json").read_text())["model_type"]
    assert {f"checkpoint-{STEPS}", "config.json"} == {path.name for path in output.iterdir()}


def test_refusals_are_lines_and_a_status(program: Path, tmp_path: Path) -> None:
    """On the command line a refusal is a sentence with a place and a hint, exit status 2, and no traceback."""
    command = [program, "adopt", str(tmp_path / "nothing"), "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (2, "") == (done.returncode, done.stdout)
    assert "there is no such checkpoint directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_run_on_disk_is_a_run(saved: dict[str, Saved], tmp_path: Path) -> None:
    """An adopted full run carries its base: config and files name no place outside of it."""
    Run.adopt(saved["full"].folder, tmp_path / "run")
    base = tmp_path / "run/base"
    assert "base" == yaml.safe_load((tmp_path / "run/onward.yaml").read_text())["model"]
    stock.assert_equal(load_file(saved["full"].folder / "model.safetensors"), load_file(base / "model.safetensors"))
    assert [] == [path for path in base.iterdir() if path.suffix in (".pt", ".pth")]
    assert [] == list((tmp_path / "run").rglob(".tmp-*"))


def test_an_interrupted_adoption_is_made_again(saved: dict[str, Saved], tmp_path: Path) -> None:
    """What it left is removed, as its unfinished ledger shows; what somebody else put beside it stays."""
    layout = RunLayout(tmp_path / "run")
    left, mine = layout.current / ".tmp-checkpoint-40", layout.current / ".tmp-checkpoint-7"
    for folder in (left, mine):
        folder.mkdir(parents=True)
        (folder / "notes").write_text("some")
    with Ledger(tmp_path / "run/.tmp-ledger.sqlite3", create=True) as begun:
        begun.begin_checkpoint(step=40, file_id=None, boundary=1, state_digest="", basis="")
    assert Run.adopt(saved["lora"].folder, layout.root).verify().ok
    assert [mine] == list(layout.root.rglob(".tmp-*"))
    assert "some" == (mine / "notes").read_text()


def test_reset_is_back_at_the_adopted_step(
    saved: dict[str, Saved], method: str, model: Path, file: Path, tmp_path: Path
) -> None:
    """The adopted beginning is always kept, and `reset` goes back to it: all is as it was the first time."""
    settings = {**SETTINGS, "keep_boundaries": 1, "keep_days": 0}
    run = Run.adopt(saved[method].folder, tmp_path / "run", str(model), settings=settings)
    run.train(file)
    first = read_state(run.layout.root)
    for number in (1, 2):
        run.train(tiny.write_jsonl(tmp_path / f"{number}.jsonl", tiny.chat_rows(4, seed=number)))
    assert [STEPS + 7, STEPS + 6, STEPS] == [int(path.name[5:]) for path in run.layout.restore_points()]
    back = onward("reset", "--yes", "--run", run.layout.root)
    assert f"back at the adopted step {STEPS}; undone: more.jsonl, 1.jsonl, 2.jsonl. The" in back.err
    state = stock.open_state(run.layout.root)
    stock.assert_equal(saved[method].weights, stock.trained(state.model))
    stock.assert_equal(saved[method].moments, stock.moments(state.model, state.optimizer))
    run.train(file)
    again = read_state(run.layout.root)
    stock.assert_equal(first["tensors"], again["tensors"])
    assert run.verify(deep=True).ok


def test_reset_without_the_adopted_state_is_refused(
    saved: dict[str, Saved], model: Path, file: Path, tmp_path: Path
) -> None:
    """Where the adopted state is gone, nothing is forgotten, and the ways out are named."""
    run = Run.adopt(saved["lora"].folder, tmp_path / "run", str(model), settings=SETTINGS)
    run.train(file)
    shutil.rmtree(run.layout.boundary(STEPS))
    with pytest.raises(UsageError, match="no longer kept") as caught:
        run.reset()
    assert f"onward rollback --to step:{STEPS + 5}" in str(caught.value.hint)
    assert "onward adopt CHECKPOINT" in str(caught.value.hint)
    assert STEPS + 5 == run.status()["global_step"]
    assert run.verify().ok


@pytest.mark.parametrize("is_old", [False, True], ids=["now", "by an earlier release"])
def test_an_adopted_run_can_be_moved(is_old: bool, saved: dict[str, Saved], file: Path, tmp_path: Path) -> None:
    """A run that carries its base is whole wherever it is, also where its config names the base by an old path."""
    root = tmp_path / "run"
    run = Run.adopt(saved["full"].folder, root, settings=SETTINGS)
    if is_old:
        config = run.layout.config
        config.write_text(re.sub("^model: .*$", f"model: {root / 'base'}", config.read_text(), flags=re.MULTILINE))
        assert str(root / "base") == Run(root).config.model
    moved = root.rename(tmp_path / "moved")
    Run(moved).train(file)
    assert_went_on(moved, STEPS)


def test_adoption_tells_what_it_took_over(saved: dict[str, Saved], model: Path, tmp_path: Path) -> None:
    """`adopt` says what came from the checkpoint, what was set by hand, what is new and what is unknown."""
    layout = RunLayout(tmp_path / "run")
    settings = {"max_length": 128, "lora": {"dropout": 0.2}}
    lines = adopt(saved["lora"].folder, layout, str(model), settings, lambda _: None)
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
