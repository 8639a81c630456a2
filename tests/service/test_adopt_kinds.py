"""Checkpoints of other optimizers, adapters and tools: taken exactly, or refused by name with a way on that works."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny
import torch
from accelerate.utils import merge_fsdp_weights
from commands import onward
from safetensors.torch import load_file
from states import read_state
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from onward import Run
from onward.config import Config
from onward.errors import ConfigError, ModelError, OnwardError, UsageError
from onward.training.foreign.arguments import Arguments
from onward.training.foreign.folders import open_folder
from onward.training.foreign.grouping import GROUPINGS
from onward.training.foreign.moments import load_into, read_moments
from onward.training.model.adapter_config import read_adapter
from onward.training.optimizers import ADAMW
from onward.training.state import TrainState

STEPS, HORIZON = 5, 40
SETTINGS: dict[str, Any] = {"evaluation": {"share": 0}, "max_length": 128}


@dataclass(frozen=True)
class Saved:
    """A stock checkpoint, and the model and the moments that its Trainer held."""

    folder: Path
    model: Any
    moments: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A stock LoRA checkpoint, in the middle of a linear schedule."""
    root, adapted = tmp_path_factory.mktemp("stock"), stock.lora_model(model)
    settings: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(STEPS)], "weight_decay": 0.1}
    trainer = stock.trainer(adapted, root, gradient_accumulation_steps=2, warmup_steps=2, **settings)
    trainer.train()
    return Saved(root / f"checkpoint-{STEPS}", adapted, stock.moments(adapted, trainer.optimizer))


@pytest.fixture
def checkpoint(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the stock checkpoint, to be changed."""
    return shutil.copytree(saved.folder, tmp_path / f"checkpoint-{STEPS}")


Edit = Callable[[dict[str, Any]], Any]


def change(folder: Path, edit: Edit) -> None:
    """Edit the optimizer's state of a checkpoint."""
    values = torch.load(folder / "optimizer.pt", weights_only=True)
    edit(values)
    torch.save(values, folder / "optimizer.pt")


def each_entry(edit: Edit) -> Edit:
    """Edit what is kept for each parameter."""
    return lambda values: [edit(entry) for entry in values["state"].values()]


def each_group(edit: Edit) -> Edit:
    """Edit the settings of each group."""
    return lambda values: [edit(group) for group in values["param_groups"]]


def both(*edits: Edit) -> Edit:
    """Edit several times."""
    return lambda values: [edit(values) for edit in edits]


def only(*names: str, **others: Any) -> Edit:
    """Leave a group only some of its settings, and give it others."""

    def keep(group: dict[str, Any]) -> None:
        kept = {name: group[name] for name in ("params", "lr", "betas", "eps", "weight_decay", *names)}
        group.clear()
        group.update(kept, **others)

    return keep


def counted_whole(entry: dict[str, Any]) -> None:
    """Count steps in an integer, as PyTorch before 1.12, transformers 4 and bitsandbytes do."""
    entry["step"] = int(entry["step"])


def of_bitsandbytes(entry: dict[str, Any]) -> None:
    """Keep moments as bitsandbytes' 32-bit optimizers do."""
    entry.update(step=int(entry["step"]), state1=entry.pop("exp_avg"), state2=entry.pop("exp_avg_sq"))


def wrapped(entry: dict[str, Any]) -> None:
    """Keep them as bitsandbytes does since 0.49."""
    of_bitsandbytes(entry)
    entry["__bnb_optimizer_quant_state__"] = {name: entry.pop(name) for name in ("state1", "state2")}


def of_apex(values: dict[str, Any]) -> None:
    """Count steps once per group."""
    for group in values["param_groups"]:
        group.update(step=STEPS, bias_correction=1)
        del group["amsgrad"]
    for entry in values["state"].values():
        del entry["step"]


TAKEN: dict[str, Edit] = {
    "as it is": lambda values: None,
    "whole steps": each_entry(counted_whole),
    "steps in a tensor of one": each_entry(lambda entry: entry.update(step=entry["step"].reshape(1))),
    "an older PyTorch": each_group(only("amsgrad", maximize=False, foreach=None, capturable=False)),
    "transformers 4": both(each_entry(counted_whole), each_group(only(correct_bias=True))),
    "bitsandbytes, 32 bit": both(each_entry(of_bitsandbytes), each_group(only())),
    "bitsandbytes, 32 bit, wrapped": both(each_entry(wrapped), each_group(only(alpha=0.0, t_alpha=None, t_beta3=None))),
    "apex": of_apex,
    "Adam without weight decay": each_group(lambda group: group.update(decoupled_weight_decay=False, weight_decay=0.0)),
}  # fmt: skip


def start(saved: Saved) -> TrainState:
    """Return a fresh state of the stock model."""
    return TrainState.start(saved.model, Config())


def load(state: TrainState, folder: Path, **arguments: Any) -> list[str]:
    """Load a checkpoint's moments into a state."""
    opened = open_folder(folder, fresh=False)
    return load_into(state, read_moments(opened, Arguments(arguments), one_rate=False), opened)


@pytest.mark.parametrize("case", TAKEN)
def test_moments_of_every_kind_of_adamw_are_taken(case: str, saved: Saved, checkpoint: Path) -> None:
    """Each keeps other names, types or settings; moments and steps are the same, by parameter name."""
    change(checkpoint, TAKEN[case])
    state = start(saved)
    assert [] == load(state, checkpoint)
    stock.assert_equal(saved.moments, stock.moments(state.model, state.optimizer))
    assert STEPS == state.view().adam_step()


def named_state(saved: Saved, prefix: str = "") -> dict[str, Any]:
    """Return the optimizer's state by the names of parameters, as FSDP gathers it."""
    values = torch.load(saved.folder / "optimizer.pt", weights_only=True)
    names = [f"{prefix}{name}" for group in GROUPINGS[0](saved.model) for name in group]
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in values["param_groups"]]
    return {"state": {names[index]: entry for index, entry in values["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("prefix", ["", "_fsdp_wrapped_module."])
def test_moments_that_are_saved_by_name_are_taken(prefix: str, saved: Saved, checkpoint: Path) -> None:
    """FSDP's full state dict, `optimizer.bin`, knows parameters by their names."""
    (checkpoint / "optimizer.pt").unlink()
    torch.save(named_state(saved, prefix), checkpoint / "optimizer.bin")
    state = start(saved)
    load(state, checkpoint)
    stock.assert_equal(saved.moments, stock.moments(state.model, state.optimizer))


def test_sharded_moments_are_taken_after_the_command_that_is_named(saved: Saved, checkpoint: Path) -> None:
    """FSDP's shards are refused with a command of PyTorch's; what it makes is adopted."""
    (checkpoint / "optimizer.pt").unlink()
    sharded.save({"optimizer": named_state(saved)}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
    with pytest.raises(UsageError, match="FSDP wrote the optimizer's state in shards") as caught:
        open_folder(checkpoint, fresh=False)
    command = re.search(r"format_utils dcp_to_torch (.*); then", str(caught.value.hint))
    assert command is not None
    source, target = shlex.split(command[1])
    dcp_to_torch_save(source, target)
    state = start(saved)
    load(state, checkpoint)
    stock.assert_equal(saved.moments, stock.moments(state.model, state.optimizer))


@pytest.mark.parametrize("number", range(len(GROUPINGS)))
def test_groups_of_every_division_are_told_apart(number: int, model: Path, tmp_path: Path) -> None:
    """Weights divided as other releases and tools do are loaded by name; where the decay changes, it is said."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    parameters = dict(whole.named_parameters())
    groups = [group for group in GROUPINGS[number](whole) if group]
    decays = [0.1, *[0.0] * (len(groups) - 1)]
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[name] for name in group], "weight_decay": decay}
         for group, decay in zip(groups, decays, strict=True)]
    )  # fmt: skip
    sum((weight * torch.rand_like(weight)).sum() for weight in parameters.values()).backward()
    optimizer.step()
    folder = tmp_path / "checkpoint-1"
    whole.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    state = TrainState.start(whole, Config(method="full"))
    lines = load(state, folder)
    stock.assert_equal(stock.moments(whole, optimizer), stock.moments(whole, state.optimizer))
    same = {*groups[0]} == {*GROUPINGS[0](whole)[0]}
    assert same == (lines == [])


def lora_plus(values: dict[str, Any]) -> None:
    """Give the weights of B another learning rate."""
    group = values["param_groups"][0]
    first, second = group["params"][::2], group["params"][1::2]
    values["param_groups"] = [{**group, "params": first}, {**group, "params": second, "initial_lr": 8e-4}]


def of_eight_bits(entry: dict[str, Any]) -> None:
    """Keep moments rounded, as 8-bit optimizers do for large weights."""
    of_bitsandbytes(entry)
    entry.update(state1=entry["state1"].byte(), state2=entry["state2"].byte(), qmap1=torch.ones(256), absmax1=1.0)


def frozen_part(values: dict[str, Any]) -> None:
    """Leave out half of the weights."""
    group = values["param_groups"][0]
    kept = group["params"][: len(group["params"]) // 2]
    values["state"] = {index: values["state"][index] for index in kept}
    group["params"] = kept


REFUSED: dict[str, tuple[Edit, str]] = {
    "8 bit": (each_entry(of_eight_bits), "8-bit"),
    "AMSGrad": (each_group(lambda group: group.update(amsgrad=True)), "AMSGrad"),
    "Adam with L2": (each_group(lambda group: group.update(decoupled_weight_decay=False)), "L2 weight decay 0.1"),
    "RAdam": (each_group(lambda group: group.pop("amsgrad")), "not that of AdamW"),
    "Lion": (
        each_entry(lambda entry: [entry.pop("exp_avg_sq"), entry.pop("step")]), "not that of AdamW: it keeps exp_avg"
    ),
    "AdEMAMix": (
        both(each_entry(of_bitsandbytes), each_group(lambda group: group.update(betas=(0.9, 0.99, 0.999)))),
        "not that of AdamW",
    ),
    "maximize": (each_group(lambda group: group.update(maximize=True)), "maximize"),
    "no correction": (each_group(lambda group: group.update(correct_bias=False)), "no correction"),
    "LoRA+": (lora_plus, "learning rates of their own"),
    "frozen": (frozen_part, "a part of the weights was frozen"),
    "weights that sat out": (lambda values: values["state"][0]["step"].sub_(1), "sat out steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_adamw_cannot_go_on_with_is_refused_by_name(case: str, saved: Saved, checkpoint: Path) -> None:
    """The refusal says what it is, what the Trainer called it, and names the command that goes on from the weights."""
    edit, reason = REFUSED[case]
    change(checkpoint, edit)
    with pytest.raises(OnwardError) as caught:
        load(start(saved), checkpoint, optim="some_adam")
    assert reason in caught.value.what
    assert f"onward adopt {checkpoint} --run NEW_RUN --fresh-moments" in str(caught.value.hint)


def test_moments_of_half_precision_go_on_from_the_same_values(saved: Saved, checkpoint: Path) -> None:
    """A Trainer whose weights were bfloat16 had moments of that type; float32 holds all of them, and it is said."""
    halves = {slot: lambda entry, slot=slot: entry.update({slot: entry[slot].bfloat16()}) for slot in ADAMW.slots}
    change(checkpoint, both(*(each_entry(edit) for edit in halves.values())))
    state = start(saved)
    lines = load(state, checkpoint)
    assert ["weights and moments were bfloat16: they go on in float32, from the same values"] == lines
    expected = {name: value.bfloat16().float() for name, value in saved.moments.items()}
    stock.assert_equal(expected, stock.moments(state.model, state.optimizer))


def test_several_learning_rates_go_on_as_one_where_it_is_set(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    """LoRA+ is adopted with its moments under a learning rate set by hand, which the refusal names."""
    change(checkpoint, lora_plus)
    with pytest.raises(UsageError, match="--set learning_rate=RATE"):
        Run.adopt(checkpoint, tmp_path / "run", str(model))
    run = Run.adopt(checkpoint, tmp_path / "run", str(model), settings={"learning_rate": 1e-4, "schedule": "constant"})
    assert (1e-4, STEPS) == (run.config.learning_rate, run.status()["global_step"])


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "begun by pissa_niter_16"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "begun by loftq"),
    "CorDA": ({"init_lora_weights": "corda"}, "begun by corda"),
    "of a future release": ({"splendid": {"more": 1}}, "splendid {'more': 1}"),
    "lora_bias": ({"lora_bias": True}, "lora_bias True"),
    "several": ({"layer_replication": [[0, 2]], "use_qalora": True}, "layer_replication [[0, 2]]; use_qalora True"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_cannot_go_on_are_refused_by_name(case: str, checkpoint: Path) -> None:
    """What changes the base, or is not known, is named, and the way on."""
    fields, reason = ADAPTERS[case]
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ModelError) as caught:
        read_adapter(checkpoint)
    assert reason in caught.value.what
    assert re.search("Merge it into its base: python -c|with --model FOLDER", str(caught.value.hint))


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_adapters_on_embedding_and_head_are_taken(layer: str, model: Path, tmp_path: Path) -> None:
    """PEFT writes the base's own rows beside such an adapter; they are recognized, and all goes on as it was."""
    adapted = stock.lora_model(model, target_modules=["q_proj", layer])
    stop: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(2)]}
    trainer = stock.trainer(adapted, tmp_path / "stock", **stop)
    trainer.train()
    folder = tmp_path / "stock/checkpoint-2"
    assert [] != [name for name in load_file(folder / "adapter_model.safetensors") if ".lora_" not in name]
    run = Run.adopt(folder, tmp_path / "run", str(model), settings=SETTINGS)
    state = stock.open_state(tmp_path / "run")
    stock.assert_equal(stock.trained(adapted), stock.trained(state.model))
    stock.assert_equal(stock.moments(adapted, trainer.optimizer), stock.moments(state.model, state.optimizer))
    assert torch.equal(stock.logits(adapted), stock.logits(state.model))
    run.train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(12)))
    assert ({5}, True) == (read_state(run.layout.root)["adam"], run.verify().ok)


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0},
        {"trainable_token_indices": [3, 5]},
        {"exclude_modules": ["layers.0.self_attn.v_proj"]},
    ],
    ids=lambda lora: "+".join(lora),
)
def test_more_of_peft_is_taken(lora: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Each field becomes a config key; weights, moments and logits are the Trainer's, and the run goes on, proven."""
    adapted = stock.lora_model(model, **lora)
    stop: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(2)]}
    trainer = stock.trainer(adapted, tmp_path / "stock", **stop)
    trainer.train()
    run = Run.adopt(tmp_path / "stock/checkpoint-2", tmp_path / "run", str(model), settings=SETTINGS)
    state = stock.open_state(tmp_path / "run")
    stock.assert_equal(stock.trained(adapted), stock.trained(state.model))
    stock.assert_equal(stock.moments(adapted, trainer.optimizer), stock.moments(state.model, state.optimizer))
    assert torch.equal(stock.logits(adapted), stock.logits(state.model))
    run.train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(12)))
    assert ({5}, True) == (read_state(run.layout.root)["adam"], run.verify(deep=True).ok)


MERGED: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "a grown vocabulary": {},
}


@pytest.mark.parametrize("case", MERGED)
def test_the_command_that_merges_makes_the_same_model(case: str, model: Path, tmp_path: Path) -> None:
    """What is refused goes on as a whole model, by the command that the refusal names: equal logits, to rounding."""
    tokenizer = tiny.byte_tokenizer(extra=["<|new|>"] if case == "a grown vocabulary" else [])
    base = AutoModelForCausalLM.from_pretrained(model)
    base.resize_token_embeddings(len(tokenizer))
    adapted = stock.lora_model(model, base=base, **MERGED[case])
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    for part in (adapted, tokenizer):
        part.save_pretrained(tmp_path / "an adapter")
    with pytest.raises(ModelError) as caught:
        Run.adopt(tmp_path / "an adapter", tmp_path / "run", str(model), fresh_moments=True)
    words = shlex.split(str(caught.value.hint).partition("base: ")[2].partition("; then: ")[0])
    assert ["python", "-c"] == words[:2]
    with contextlib.chdir(tmp_path):
        exec(compile(words[2], "hint", "exec"))  # the program that a person would run, without a new interpreter
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "MERGED")
    expected, actual = stock.logits(adapted), stock.logits(merged)
    assert torch.allclose(expected, actual, rtol=0.0, atol=1e-4)
    untrained = stock.logits(AutoModelForCausalLM.from_pretrained(model))
    assert not torch.allclose(untrained, actual[..., : untrained.shape[-1]], rtol=0.0, atol=1e-2)
    Run.create(tmp_path / "run", str(tmp_path / "MERGED"))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_how_an_adapter_began_does_not_matter_where_the_base_stayed(init: Any, checkpoint: Path) -> None:
    """First weights that are the adapter's own are gone once it is trained."""
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    assert 4 == read_adapter(checkpoint)["r"]


def test_a_whole_model_whose_vocabulary_has_grown_is_its_own_base(model: Path, tmp_path: Path) -> None:
    """Also where `--model` names what it was made from: tokens that only it has are trained. It needs its tokenizer."""
    tokenizer = tiny.byte_tokenizer(extra=["<|new|>"])
    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.resize_token_embeddings(len(tokenizer))
    stop: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(1)]}
    stock.trainer(whole, tmp_path / "stock", **stop).train()
    folder = tmp_path / "stock/checkpoint-1"
    with pytest.raises(UsageError, match=f"has {len(tokenizer)} rows in its embedding.* and no tokenizer") as caught:
        Run.adopt(folder, tmp_path / "run", str(model))
    words = shlex.split(str(caught.value.hint).partition("into it: ")[2].partition("; then")[0])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    exec(compile(words[2].replace("'TOKENIZER'", repr(str(tmp_path / "tokenizer"))), "hint", "exec"))
    run = Run.adopt(folder, tmp_path / "run", str(model), settings=SETTINGS)
    assert "base" == run.config.model
    row = {"messages": [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "<|new|>"}]}
    run.train(tiny.write_jsonl(tmp_path / "new.jsonl", [row] * 4))
    assert (2, True) == (run.status()["global_step"], run.verify().ok)


def without(folder: Path, *names: str) -> Path:
    """Remove files of a folder; return it."""
    for name in names:
        (folder / name).unlink()
    return folder


def test_an_output_folder_leads_to_its_newest_checkpoint(saved: Saved, tmp_path: Path) -> None:
    """A Trainer's output folder is none of its checkpoints; the newest by number is named."""
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


def test_a_whole_state_of_fsdp_is_renamed(tmp_path: Path) -> None:
    """FSDP's one file of weights is a model's file under another name."""
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    with pytest.raises(UsageError, match="a name of its own") as caught:
        open_folder(tmp_path, fresh=True)
    assert f"cp {tmp_path}/pytorch_model_fsdp.bin {tmp_path}/pytorch_model.bin" in str(caught.value.hint)


@pytest.mark.parametrize("tool", ["DeepSpeed", "FSDP"])
def test_weights_in_shards_are_refused_with_the_command_that_joins_them(tool: str, tmp_path: Path) -> None:
    """DeepSpeed's own script, or accelerate's command; then the weights are adopted."""
    folder = tmp_path / "a checkpoint"
    shards = "global_step5" if tool == "DeepSpeed" else "pytorch_model_fsdp_0"
    (folder / shards).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"{tool} wrote the weights of this checkpoint in shards") as caught:
        open_folder(folder, fresh=True)
    expected = {
        "DeepSpeed": f"python '{folder}/zero_to_fp32.py' --safe_serialization '{folder}' '{folder}'",
        "FSDP": f"accelerate merge-weights '{folder}/pytorch_model_fsdp_0' '{folder}'",
    }
    assert f"{expected[tool]}; then: onward adopt '{folder}' --run NEW_RUN --fresh-moments" in str(caught.value.hint)


def test_shards_of_fsdp_are_adopted_after_the_commands_that_are_named(model: Path, tmp_path: Path) -> None:
    """A checkpoint of FSDP has shards and no config; joined by accelerate, beside the base's config, it is a model."""
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
    with pytest.raises(UsageError, match=r"no config\.json beside the weights"):
        Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True)
    shutil.copy(model / "config.json", folder)
    run = Run.adopt(folder, tmp_path / "run", str(model), fresh_moments=True)
    assert 5 == run.status()["global_step"]
    stock.assert_equal(weights, stock.trained(stock.open_state(tmp_path / "run").model))


def test_moments_of_deepspeed_are_refused_by_name(checkpoint: Path) -> None:
    """Its weights are whole, its moments in shards: the way on is the weights."""
    without(checkpoint, "optimizer.pt")
    (checkpoint / f"global_step{STEPS}").mkdir()
    with pytest.raises(UsageError, match="DeepSpeed keeps the moments in shards of its own") as caught:
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
    assert f"weights only: the optimizer's moments begin afresh, after step {STEPS}" in done.err
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
    assert (1, 10, 1) == (run.status()["global_step"], run.config.warmup_steps, run.config.schedule_offset)
    run.train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(16)))
    assert run.verify().ok
    run.reset()
    stock.assert_equal(stock.trained(saved.model), stock.trained(stock.open_state(tmp_path / "run").model))


def test_a_finished_schedule_asks_how_to_go_on(model: Path, tmp_path: Path) -> None:
    """At the Trainer's last step the schedule has ended: said, refused at the next file, and settable."""
    trainer = stock.trainer(stock.lora_model(model), tmp_path / "stock", max_steps=STEPS, save_strategy="steps")
    trainer.train()
    finished = tmp_path / f"stock/checkpoint-{STEPS}"
    lines: list[str] = []
    run = Run.adopt(finished, tmp_path / "run", str(model), settings=SETTINGS, report=lines.append)
    assert "schedule (linear) is finished: step 5 was its last of 5" in lines[-1]
    file = tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(8))
    with pytest.raises(ConfigError, match="schedule linear ends at step 5"):
        run.train(file)
    settings = {**SETTINGS, "schedule": "constant", "learning_rate": 1e-4}
    again = Run.adopt(finished, tmp_path / "again", str(model), settings=settings, report=lines.append)
    assert "step 6: 0.0001 (the Trainer's: unknown)" in lines[-1]
    again.train(file)
    assert STEPS + 2 == again.status()["global_step"]


def test_a_schedule_that_no_run_has_asks_how_to_go_on(model: Path, tmp_path: Path) -> None:
    """It is refused with a command that goes on at the rate where it stood; that command works."""
    settings: dict[str, Any] = {
        "max_steps": HORIZON, "callbacks": [stock.StopAt(2)], "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 2.0},
    }  # fmt: skip
    stock.trainer(stock.lora_model(model), tmp_path / "stock", **settings).train()
    folder = tmp_path / "stock/checkpoint-2"
    refused = onward("adopt", folder, "--run", tmp_path / "run", "--model", model)
    assert 2 == refused.status
    assert "the Trainer's schedule (polynomial, now at 4.51" in refused.err
    command = re.search(r"onward (adopt .* --set learning_rate=[^\s)]+)", refused.err)
    assert command is not None
    words = shlex.split(command[1].replace("NEW_RUN", str(tmp_path / "run")))
    assert 0 == onward(*words, "--model", model).status
    assert "constant" == Run(tmp_path / "run").config.schedule


def test_what_the_trainer_had_is_the_runs(model: Path, saved: Saved, tmp_path: Path) -> None:
    """Batch, accumulation, clipping, seed and schedule are taken, and the next learning rates are the Trainer's."""
    lines: list[str] = []
    config = Run.adopt(saved.folder, tmp_path / "run", str(model), report=lines.append).config
    assert (8, 2, 1.0, 42) == (config.batch_size, config.gradient_accumulation, config.max_grad_norm, config.seed)
    assert ("linear", 2, HORIZON, 1) == (
        config.schedule, config.warmup_steps, config.total_steps, config.schedule_offset
    )  # fmt: skip
    rate = torch.load(saved.folder / "scheduler.pt", weights_only=True)["_last_lr"][0]
    assert f"step {STEPS + 1}: {rate:.6g} (the Trainer's: {rate:.6g})" in lines[-1]
    assert any("(4 rows per device, 2 accumulated, 1 device)" in line for line in lines)
