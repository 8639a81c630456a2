"""What `adopt` refuses: damage, other optimizers and models, places and settings that do not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny
import torch
from adopting import change, train_stock
from peft import PromptTuningConfig, get_peft_model
from runs import new_run
from stock import STEPS, Saved
from torch import nn
from transformers import AutoModelForCausalLM

from onward import Run
from onward.errors import ConfigError, DamagedState, ModelError, OnwardError, UsageError
from onward.training.foreign.scaler import read_scale


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
    case: str, method: str, copied: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """State that is missing, torn, of another optimizer or of another model is refused before anything is made."""
    damage, kind, reason = REFUSALS[case]
    folder = copied(method)
    damage(folder)
    with pytest.raises(kind) as caught:
        Run.adopt(folder, tmp_path / "run", str(model))
    assert reason in caught.value.what
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_torn_file_is_damage_and_no_fault_of_the_disk(
    name: str, share: float, copied: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """Wherever a file ends too early, the refusal says that it is damaged and what can be adopted in its place."""
    folder = copied("lora")
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


def test_an_optimizer_of_a_larger_model_is_refused(model: Path, by_method: dict[str, Saved], tmp_path: Path) -> None:
    """The moments of a LoRA twice as wide do not enter this one's run."""
    wide = train_stock(stock.lora_model(model, r=8), tmp_path / "wide", steps=1)
    folder = shutil.copytree(by_method["lora"].folder, tmp_path / f"checkpoint-{STEPS}")
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
def test_a_damaged_adapter_is_refused(name: str, copied: Callable[[str], Path], model: Path, tmp_path: Path) -> None:
    """Neither half an adapter config nor missing weights become a run."""
    folder = copied("lora")
    if name.endswith(".json"):
        os.truncate(folder / name, 10)
    else:
        (folder / name).unlink()
    with pytest.raises(OnwardError, match=name):
        Run.adopt(folder, tmp_path / "run", str(model))
    assert not (tmp_path / "run").exists()


def test_a_full_checkpoint_without_a_tokenizer_needs_a_base(
    copied: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    """A Trainer that was given no tokenizer saves none; the refusal names the option, which works."""
    folder = copied("full")
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
    kind: str, settings: dict[str, Any], by_method: dict[str, Saved], model: Path, tmp_path: Path
) -> None:
    """Settings cannot contradict the checkpoint's weights."""
    with pytest.raises(ConfigError, match="a different shape"):
        Run.adopt(by_method[kind].folder, tmp_path / "run", str(model), settings=settings)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_touched(by_method: dict[str, Saved], model: Path, tmp_path: Path) -> None:
    """A directory that has a run is refused, and every file of it stays as it was."""
    new_run(tmp_path / "run", model)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="there is already a run in this directory"):
        Run.adopt(by_method["lora"].folder, tmp_path / "run", str(model))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_the_trainers_output_directory_is_not_written_over(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """A directory with a model's config.json is refused as a run; the model stays readable."""
    output = copied("full").parent
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
