"""The files that, with the weights, make a Hugging Face checkpoint, as transformers' Trainer writes them."""

from __future__ import annotations

import io
import json
import random
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from onward.atomic import system_errors
from onward.config import Config
from onward.training.model.quiet import quiet
from onward.training.optimizers import file_state
from onward.training.schedule import lagging_rate
from onward.training.seeds import fold
from onward.training.state import Snapshot

OPTIMIZER, SCHEDULER, RNG, SCALER = "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"
TRAINER_STATE, TRAINING_ARGUMENTS = "trainer_state.json", "training_args.bin"
FOR_TRAINING = frozenset((OPTIMIZER, SCHEDULER, RNG, SCALER, TRAINER_STATE, TRAINING_ARGUMENTS))
"""Files that are needed only to continue training; the others are the model and its tokenizer."""
CALLBACKS: dict[str, Any] = {
    "TrainerControl": {
        "args": dict.fromkeys(
            ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log"), False
        ),
        "attributes": {},
    },
    "EarlyStoppingCallback": [],
}
"""States of callbacks. A Trainer that saves looks up each of its own here and fails if one is missing; an empty list is
a place for one, without a state that would replace the Trainer's."""
LOG_TAIL = 50
"""How many entries of `log_history` a checkpoint contains; the whole history is in the ledger."""


def to_bytes(value: Any) -> bytes:
    """Return `value` as `torch.save` writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def save(value: Any, path: Path) -> None:
    """Write `value` like `torch.save`, without a copy of it in memory.

    Raises:
        OSError: the disk is full or failing; PyTorch's writer hides this behind an error of its own.
    """
    try:
        with path.open("wb") as stream:
            torch.save(value, stream)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def resuming_rate(state: Snapshot, config: Config) -> float:
    """Return the learning rate with which a Trainer that resumes takes its first step.

    A Trainer's step has the rate of the position before it, which in a run is that of the last step. If the run's
    schedule lags as a Trainer's does, because one began it, it is that of the next step.
    """
    if not config.schedule_offset:
        return state.learning_rate
    taken = 0 if state.cursor.at_boundary else state.cursor.step
    return lagging_rate(config, state.step + 1, taken + 1)


def optimizer_state(state: Snapshot, config: Config) -> dict[str, Any]:
    """Return `optimizer.pt`: the moments, and groups with the learning rate with which a Trainer resumes."""
    saved = file_state(state.method, state.optimizer)
    rate = resuming_rate(state, config)
    return {**saved, "param_groups": [{**group, "lr": rate} for group in saved["param_groups"]]}


def scheduler_state(state: Snapshot, config: Config) -> dict[str, Any]:
    """Return the state of the `LambdaLR` that the Trainer would have at this step."""
    groups = len(state.optimizer["param_groups"])
    return {
        "base_lrs": [config.learning_rate] * groups,
        "last_epoch": state.step,
        "_step_count": state.step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [resuming_rate(state, config)] * groups,
        "lr_lambdas": [None] * groups,
    }


def random_state(config: Config, step: int) -> dict[str, Any]:
    """Return generator states that are a function of seed and step, as plain numbers and tensors.

    Onward never reads them; a stock Trainer that resumes from the checkpoint sets its generators to them.
    """
    seed = fold(config.seed, "rng_state", step)
    words = random.Random(seed).getstate()
    return {
        "python": words,
        "numpy": ("MT19937", list(words[1][:-1]), words[1][-1], 0, 0.0),
        "cpu": torch.Generator().manual_seed(seed).get_state(),
        "cuda": torch.tensor(list(struct.pack("<QQ", seed, 0)), dtype=torch.uint8),  # seed and offset, in CUDA's order
    }


def trainer_state(state: Snapshot, config: Config, log_history: Sequence[dict[str, Any]]) -> bytes:
    """Return `trainer_state.json`: the fields of `TrainerState` that a Trainer needs, with a bounded log.

    A Trainer that resumes takes every field from here, and its own default for a field that is left out. So
    `save_steps`, `logging_steps` and `eval_steps` are left out: the run's must not replace the Trainer's. Fields that
    only newer releases have are left out too, because older ones refuse unknown fields.
    """
    cursor = state.cursor
    values = {
        "epoch": cursor.step * config.epochs / cursor.steps if cursor.steps else 0.0,
        "global_step": state.step,
        "max_steps": state.step,
        "train_batch_size": config.batch_size,
        "num_train_epochs": config.epochs,
        "num_input_tokens_seen": state.counters.tokens,
        "total_flos": 0.0,
        "log_history": list(log_history)[-LOG_TAIL:],
        "best_metric": None,
        "best_model_checkpoint": None,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "is_hyper_param_search": False,
        "trial_name": None,
        "trial_params": None,
        "stateful_callbacks": CALLBACKS,
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def training_arguments(config: Config) -> bytes:
    """Return `training_args.bin` under a config, for tools that look for it; Onward never reads it."""
    from transformers import TrainingArguments

    named: dict[str, Any] = {"optim": "adamw_bnb_8bit"} if config.optimizer == "adamw_8bit" else {}
    named["lr_scheduler_type"] = {"constant": "constant_with_warmup", "wsd": "constant_with_warmup"}.get(
        config.schedule, config.schedule
    )
    with quiet():  # it warns about a process group, which is not the Trainer's
        arguments = TrainingArguments(
            output_dir="current_model",
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            num_train_epochs=config.epochs,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_epsilon=config.eps,
            max_grad_norm=config.max_grad_norm,
            save_steps=config.save_steps,
            logging_steps=config.log_steps,
            seed=config.seed % 2**32,
            report_to=[],
            **named,
        )
    return to_bytes(arguments)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return the tokenizer's files by name, including its chat templates.

    Several templates go into its config: transformers would put those with other names into a folder of their own.
    """
    with tempfile.TemporaryDirectory() as folder, system_errors(Path(folder)):
        tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
