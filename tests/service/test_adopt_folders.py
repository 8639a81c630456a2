"""Folders that other tools write: what can be adopted of each, and the command that makes it so."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny
import torch
from accelerate.utils import merge_fsdp_weights
from commands import onward
from safetensors.torch import load_file, save_file
from states import read_state
from stock import STEPS, Saved
from torch.distributed import checkpoint as sharded
from transformers import AutoModelForCausalLM, TrainingArguments

from onward import Run
from onward.errors import DamagedState, UsageError
from onward.training.foreign.folders import open_folder
from onward.training.model.adapter_config import adapter_settings, read_adapter

SETTINGS: dict[str, Any] = {"evaluation": {"share": 0}, "max_length": 128}


def without(folder: Path, *names: str) -> Path:
    """Remove files of a folder; return it."""
    for name in names:
        (folder / name).unlink()
    return folder


def test_an_output_folder_leads_to_its_newest_checkpoint(saved: Saved, tmp_path: Path) -> None:
    """A Trainer's output folder is not one of its checkpoints; the refusal names the newest by number."""
    for step in (2, 10, 9):
        shutil.copytree(saved.folder, tmp_path / f"out/checkpoint-{step}")
    with pytest.raises(UsageError, match=r"no optimizer\.pt") as caught:
        open_folder(tmp_path / "out", fresh=False)
    assert f"onward adopt {tmp_path}/out/checkpoint-10 --run NEW_RUN" in str(caught.value.hint)


def test_weights_of_an_old_peft_are_adopted_after_the_command_that_is_named(saved: Saved, checkpoint: Path) -> None:
    """`adapter_model.bin` is refused with a command that writes it as safetensors."""
    weights = load_file(checkpoint / "adapter_model.safetensors")
    torch.save(weights, without(checkpoint, "adapter_model.safetensors") / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors is missing") as caught:
        read_adapter(checkpoint)
    words = shlex.split(str(caught.value.hint).partition("one: ")[2].partition("; then adopt")[0])
    exec(compile(words[2], "hint", "exec"))
    assert 4 == read_adapter(checkpoint)["r"]
    stock.assert_equal(weights, load_file(checkpoint / "adapter_model.safetensors"))


def test_an_adapter_of_another_name_is_adopted_after_the_command_that_is_named(
    saved: Saved, checkpoint: Path, model: Path, tmp_path: Path
) -> None:
    """PEFT puts an adapter that is not called `default` into a folder of its name; the moments lie next to that."""
    (checkpoint / "mine").mkdir()
    for path in checkpoint.glob("adapter_*"):
        path.rename(checkpoint / "mine" / path.name)
    with pytest.raises(UsageError, match="a folder: mine") as caught:
        Run.adopt(checkpoint, tmp_path / "run", str(model))
    command = re.search(r"cp .*?(?=; then adopt again)", str(caught.value.hint))
    assert command is not None
    assert 0 == subprocess.run(command[0], shell=True, check=False).returncode
    Run.adopt(checkpoint, tmp_path / "run", str(model))
    stock.assert_equal(stock.trained(saved.model), stock.trained(stock.open_state(tmp_path / "run").model))


def test_a_whole_state_of_fsdp_is_renamed(tmp_path: Path) -> None:
    """FSDP's one file of weights is a model's file under another name."""
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    with pytest.raises(UsageError, match="a different name") as caught:
        open_folder(tmp_path, fresh=True)
    assert f"cp {tmp_path}/pytorch_model_fsdp.bin {tmp_path}/pytorch_model.bin" in str(caught.value.hint)


@pytest.mark.parametrize(("tool", "has_script"), [("DeepSpeed", True), ("DeepSpeed", False), ("FSDP", False)])
def test_weights_in_shards_are_refused_with_the_command_that_joins_them(
    tool: str, has_script: bool, tmp_path: Path
) -> None:
    """DeepSpeed's own script, from its package if it was not copied along, or accelerate's command; then the weights
    are adopted."""
    folder = tmp_path / "a checkpoint"
    shards = "global_step5" if tool == "DeepSpeed" else "pytorch_model_fsdp_0"
    (folder / shards).mkdir(parents=True)
    if has_script:
        (folder / "zero_to_fp32.py").touch()
    with pytest.raises(UsageError, match=f"{tool} wrote the weights of this checkpoint in shards") as caught:
        open_folder(folder, fresh=True)
    script = f"'{folder}/zero_to_fp32.py'" if has_script else "-m deepspeed.utils.zero_to_fp32"
    expected = {
        "DeepSpeed": f"python {script} --safe_serialization '{folder}' '{folder}'",
        "FSDP": f"accelerate merge-weights '{folder}/pytorch_model_fsdp_0' '{folder}'",
    }
    assert f"{expected[tool]}; then: onward adopt '{folder}' --run NEW_RUN --fresh-moments" in str(caught.value.hint)
    (folder / "optimizer_0").mkdir()
    with pytest.raises(UsageError) as caught:
        open_folder(folder, fresh=False)
    assert f"{expected[tool]}; then adopt again" in str(caught.value.hint)


def test_shards_of_fsdp_are_adopted_after_the_commands_that_are_named(model: Path, tmp_path: Path) -> None:
    """A checkpoint of FSDP has shards and no config; joined by accelerate, next to the base's config, it is a model."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    weights = {name: torch.randn_like(weight) for name, weight in whole.named_parameters()}
    sharded.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    with pytest.raises(UsageError, match="in shards") as caught:
        Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True)
    command = re.search(r"accelerate merge-weights (.*); then", str(caught.value.hint))
    assert command is not None
    merge_fsdp_weights(*shlex.split(command[1]))
    with pytest.raises(UsageError, match=r"no config\.json next to the weights"):
        Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True)
    shutil.copy(model / "config.json", folder)
    run = Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True)
    assert 5 == run.status()["global_step"]
    stock.assert_equal(weights, stock.trained(stock.open_state(tmp_path / "run").model))


def test_an_adapter_in_shards_of_fsdp_is_adopted_after_the_commands_that_are_named(
    saved: Saved, model: Path, tmp_path: Path
) -> None:
    """accelerate writes what it joins as a whole model, and FSDP saves no config of an adapter."""
    folder, weights = tmp_path / "checkpoint-5", load_file(saved.folder / "adapter_model.safetensors")
    folder.mkdir()
    sharded.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    merge_fsdp_weights(str(folder / "pytorch_model_fsdp_0"), str(folder))
    with pytest.raises(UsageError, match=r"model\.safetensors has the weights of an adapter") as caught:
        Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True)
    assert f"LoraConfig(...).save_pretrained('{folder}')" in str(caught.value.hint)
    shutil.copy(saved.folder / "adapter_config.json", folder)
    with pytest.raises(UsageError) as caught:
        Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True)
    command = re.search(r"Rename them: (.*); then adopt again\.$", str(caught.value.hint))
    assert command is not None
    subprocess.run(shlex.split(command[1]), check=True)
    Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True)
    stock.assert_equal(weights, load_file(tmp_path / "run" / "current_model" / "adapter_model.safetensors"))


@pytest.mark.parametrize("has_config", [False, True])
@pytest.mark.parametrize("file", ["pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata", "global_step5/x.pt"])
def test_a_base_in_shards_is_refused_with_the_command_that_says_more(
    file: str, has_config: bool, model: Path, tmp_path: Path
) -> None:
    """`init` knows no shards; `adopt` names the tool and the command that joins them."""
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", *(["c*.json"] * (not has_config))))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).touch()
    outcome = onward("init", tmp_path / "run", "--model", folder)
    assert (2, True) == (outcome.status, f"onward adopt {folder} --run NEW_RUN" in outcome.err)
    outcome = onward("adopt", folder, "--run", tmp_path / "run")
    assert (2, True) == (outcome.status, any(tool in outcome.err for tool in ("FSDP", "DeepSpeed")))


@pytest.mark.parametrize(
    ("files", "what", "way_out"),
    [
        (["x_model_states.pt"], "these are DeepSpeed's shards", "Name the folder above it: onward adopt "),
        (["epoch_0/adapter_config.json"], "adapters are in folders: epoch_0", "/epoch_0 --run NEW_RUN --fresh-moments"),
        ([".metadata", "__0_0.distcp"], r"torch\.distributed\.checkpoint wrote the weights", "dcp_to_torch"),
        (["ft-model-00001-of-00001.safetensors"], "does not read weights of this name: ft-model", "Rename them"),
        (["README.md"], "there are no weights", "Name a folder with model.safetensors"),
    ],
)
def test_a_folder_without_weights_to_read_is_refused_by_what_it_has(
    files: list[str], what: str, way_out: str, tmp_path: Path
) -> None:
    """Epochs of torchtune, shards without FSDP's names, weights under other names, and none at all."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    for fresh in (False, True):
        with pytest.raises(UsageError, match=what) as caught:
            open_folder(tmp_path, fresh=fresh)
        assert way_out in str(caught.value.hint)


def test_weights_that_deepspeed_left_without_numbers_are_refused(checkpoint: Path) -> None:
    """Its third stage saves names alone unless it is told to gather; that is the way out."""
    path = checkpoint / "adapter_model.safetensors"
    save_file({name: torch.zeros(0) for name in load_file(path)}, path)
    with pytest.raises(UsageError, match="its weights are without numbers") as caught:
        open_folder(checkpoint, fresh=True)
    assert "stage3_gather_16bit_weights_on_model_save" in str(caught.value.hint)


def test_an_adapter_that_names_no_dropout_has_the_default_of_peft(checkpoint: Path) -> None:
    """torchtune writes only what it sets; without a rank nothing is known."""
    values = read_adapter(checkpoint)
    del values["lora_dropout"]
    assert 0.0 == adapter_settings(values)["lora.dropout"]
    del values["r"]
    with pytest.raises(DamagedState, match="does not say 'r'"):
        adapter_settings(values)


def test_moments_of_deepspeed_are_refused_by_name(checkpoint: Path) -> None:
    """Its weights are whole, its moments in shards: the way on is the weights."""
    without(checkpoint, "optimizer.pt")
    (checkpoint / f"global_step{STEPS}").mkdir()
    with pytest.raises(UsageError, match="DeepSpeed keeps the moments in its own shards") as caught:
        open_folder(checkpoint, fresh=False)
    assert "--fresh-moments" in str(caught.value.hint)


def test_weights_go_on_with_fresh_moments(saved: Saved, model: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Without an optimizer the command line takes the weights, says so, and goes on with step and schedule."""
    without(checkpoint, "optimizer.pt", "scheduler.pt")
    refused = onward("adopt", checkpoint, "--run", tmp_path / "run", "--model", model)
    assert 2 == refused.status
    assert "--fresh-moments" in refused.err
    done = onward("adopt", checkpoint, "--run", tmp_path / "run", "--model", model, "--fresh-moments",
                  "--set", "max_length=128")  # fmt: skip
    assert 0 == done.status
    assert f"weights only: the optimizer's moments start fresh, after step {STEPS}" in done.err
    (taken,) = (line for line in done.err.splitlines() if line.startswith("from training_args.bin: batch_size 8 ("))
    assert ["weight_decay 0.1", "betas 0.9 0.999", "eps 1e-08"] == taken.partition("), ")[2].split(", ")[:3]
    assert 1 == taken.count("batch_size")
    assert "the Trainer's optimizer was" not in done.err
    state = stock.open_state(tmp_path / "run")
    assert (STEPS, STEPS, 0) == (state.step, state.counters.adam_origin, state.view().adam_step())
    stock.assert_equal(stock.trained(saved.model), stock.trained(state.model))
    run = Run(tmp_path / "run")
    run.train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(16)))
    assert (STEPS + 2, {2}) == (run.status()["global_step"], read_state(run.layout.root)["adam"])
    assert run.verify().ok


def test_an_adapter_alone_goes_on(saved: Saved, model: Path, tmp_path: Path) -> None:
    """A folder with nothing but an adapter: its own training counts as a step, the run warms up, `reset` comes back."""
    folder = tmp_path / "adapter"
    saved.model.save_pretrained(folder)
    lines: list[str] = []
    run = Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True, settings=SETTINGS, report=lines.append)
    assert any("after an unknown number of steps, counted as 1" in line for line in lines)
    assert "from schedule of the Trainer: schedule_offset 1" in lines
    assert "learning rates (schedule constant): step 2: 2e-05 (the Trainer's: unknown), " in lines[-1]
    assert (1, 10, 1) == (run.status()["global_step"], run.config.warmup_steps, run.config.schedule_offset)
    run.train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(16)))
    assert run.verify().ok
    run.reset()
    stock.assert_equal(stock.trained(saved.model), stock.trained(stock.open_state(tmp_path / "run").model))


def test_another_optimizer_is_named_where_only_the_weights_go_on(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    """A learning rate for SGD may be a thousand times that for AdamW: adoption says whose the rate is."""
    arguments = TrainingArguments(output_dir=str(tmp_path), optim="sgd", learning_rate=0.1, report_to=[], use_cpu=True)
    torch.save(arguments, checkpoint / "training_args.bin")
    without(checkpoint, "scheduler.pt")
    lines: list[str] = []
    Run.adopt(checkpoint, tmp_path / "run", str(model), fresh_moments=True, report=lines.append)
    (line,) = (line for line in lines if line.startswith("the Trainer's optimizer was sgd"))
    assert "the run's is AdamW, which learning_rate 0.1 may not suit" in line
    assert line.endswith("--set schedule=constant --set learning_rate=RATE sets another")
