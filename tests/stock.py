"""transformers' own Trainer, which writes checkpoints that Onward adopts, and resumes from Onward's."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from onward.config.text import read_config
from onward.layout import RunLayout
from onward.training.checkpoints.checkpoint import inspect_checkpoint
from onward.training.checkpoints.loading import load_state
from onward.training.model.base import resolve_base
from onward.training.model.spec import ModelSpec
from onward.training.model.treatment import Treatment
from onward.training.state import TrainState

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
}
LENGTH = 24
STEPS, HORIZON = 5, 40
"""Steps after which a checkpoint is taken, and those of its schedule."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the model and the moments that its Trainer held."""

    folder: Path
    model: Any
    moments: dict[str, torch.Tensor]


class StopAt(TrainerCallback):
    """Ends training after a step, before its schedule ends."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the end, and for a checkpoint."""
        control.should_training_stop = control.should_save = state.global_step >= self.step


def lora_model(folder: Path, *, base: Any = None, **settings: Any) -> PeftModel:
    """Return a fresh adapter on a base model: that of the folder, or one that was loaded and changed."""
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        **settings,
    }
    adapter = LoraConfig(task_type="CAUSAL_LM", **shape)
    model: Any = get_peft_model(base or AutoModelForCausalLM.from_pretrained(folder), adapter)
    return model


def trainer(model: Any, output: Path, *, rows: int = 40, **settings: Any) -> Trainer:
    """Return a Trainer over `rows` chats of equal length; settings are its own or those of its arguments."""
    own = {key: settings.pop(key) for key in ("callbacks", "processing_class") if key in settings}
    tokenizer = tiny.byte_tokenizer()
    data: Any = []
    for row in tiny.chat_rows(rows, seed=11):
        ids = tokenizer(row["messages"][0]["content"] * 2)["input_ids"][:LENGTH]
        data.append({"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": ids})
    arguments = TrainingArguments(output_dir=str(output), **{**ARGUMENTS, **settings})
    evaluated = data if arguments.eval_strategy != "no" else None
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=evaluated, **own)


def save_lora(base: Path, root: Path) -> Saved:
    """Train an adapter, and save a checkpoint in the middle of a linear schedule."""
    adapted = lora_model(base)
    settings: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [StopAt(STEPS)], "weight_decay": 0.1}
    trained_by = trainer(adapted, root, gradient_accumulation_steps=2, warmup_steps=2, **settings)
    trained_by.train()
    return Saved(root / f"checkpoint-{STEPS}", adapted, moments(adapted, trained_by.optimizer))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every trainable weight by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def moments(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Return a copy of everything that an optimizer keeps, by parameter and key."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
        for key, value in optimizer.state[weight].items()
    }


def open_state(run: Path, treatment: Treatment | None = None) -> TrainState:
    """Load what a run's newest checkpoint holds, as Onward does.

    Args:
        treatment: what the model's admission found.
    """
    layout = RunLayout(run)
    config = read_config(layout.config)
    folder = layout.checkpoints()[0]
    found = inspect_checkpoint(folder)
    assert [] == found.problems
    assert found.manifest is not None
    base = resolve_base(config.model, root=run)
    spec = ModelSpec(config, base, torch.device("cpu"), torch.float32)
    return load_state(folder, found.manifest, spec, treatment=treatment)


def logits(model: nn.Module) -> torch.Tensor:
    """Return what a model computes for one fixed row; its tensors are copied, so that their alignment is the same."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(input_ids=torch.arange(3, 3 + LENGTH)[None]).logits


def assert_equal(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    """The same names, and every tensor equal bit for bit."""
    assert expected
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
