"""The arguments of a Trainer as config keys: which are taken over, and which are not and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from onward.text import how_many
from onward.training.foreign.arguments import Arguments
from onward.training.foreign.folders import TrainerFolder

LENGTHS = ("max_length", "max_seq_length", "sequence_len")
"""The names of the maximum row length in TRL, in its earlier releases and in Axolotl."""

LEFT: Mapping[str, str] = {
    "label_smoothing_factor": "a run has none",
    "neftune_noise_alpha": "a run has none",
    "loss_type": "a run's loss is the negative log-likelihood of the targets",
    "beta": "a run's loss has no term for preferences or a teacher",
    "packing": "rows are trained one by one, laid end to end if the model allows it",
    "sample_packing": "rows are trained one by one, laid end to end if the model allows it",
    "padding_free": "rows are laid end to end where the model allows it",
    "group_by_length": "the order of rows is the run's own, a function of the seed",
    "train_sampling_strategy": "the order of rows is the run's own, a function of the seed",
    "dataloader_drop_last": "every row is trained",
    "data_seed": "the order of rows is the run's own, a function of the seed",
    "fp16": "a run computes in the type that dtype says: --set dtype=float16 continues its loss scale",
    "bf16": "a run computes in the type that dtype says",
    "gradient_checkpointing": "it changes memory, not numbers",
    "use_liger_kernel": "it changes memory and last bits",
    "torch_compile": "it changes speed and last bits",
    "loraplus_lr_ratio": "a run has one learning rate",
    "embedding_learning_rate": "a run has one learning rate",
    "embedding_lr": "a run has one learning rate",
    "embedding_lr_scale": "a run has one learning rate",
    "dataset_text_field": "a run recognizes rows by their keys",
    "auto_find_batch_size": "the batch size that it found is taken",
}
"""Arguments that are not taken over if they are set, and why."""

USUAL = ("text", "random", "nll", "chunked_nll")
"""Values of these arguments that amount to not being set."""

ROUTER_LOSS = "router_aux_loss_coef"

WITHOUT: Mapping[str, str] = {
    "assistant_only_loss": "a run trains every answer of a chat and nothing else",
    "completion_only_loss": "a run trains only the completion of such a row",
}
"""Arguments that are not taken over if they are false, and why."""


def batch_settings(folder: TrainerFolder, arguments: Arguments) -> dict[str, Any]:
    """Return the number of rows of an optimizer step, and of the parts that they were computed in."""
    parts = _parts(arguments)
    return {"batch_size": _rows_per_device(folder, arguments) * parts, "gradient_accumulation": parts}


def batch_words(folder: TrainerFolder, arguments: Arguments) -> str:
    """Return how the rows of a step add up, in words."""
    rows, accumulated = _rows_per_device(folder, arguments), arguments.count("gradient_accumulation_steps")
    devices = _parts(arguments) // accumulated
    return f"{rows} rows per device, {accumulated} accumulated, {how_many(devices, 'device')}"


def _rows_per_device(folder: TrainerFolder, arguments: Arguments) -> int:
    said = arguments.count("per_device_train_batch_size") if "per_device_train_batch_size" in arguments.values else 8
    per_process = folder.batch_rows or said * arguments.count("_n_gpu")
    rows = max(1, per_process // arguments.count("_n_gpu"))
    return max(1, rows // arguments.processes) if _splits_batches(arguments) else rows


def _parts(arguments: Arguments) -> int:
    return arguments.count("gradient_accumulation_steps") * arguments.count("_n_gpu") * arguments.processes


def _splits_batches(arguments: Arguments) -> bool:
    accelerator = arguments.values.get("accelerator_config")
    held: Mapping[str, Any] = accelerator if isinstance(accelerator, dict) else {}
    return bool(held.get("split_batches", arguments.values.get("split_batches")))


def argument_settings(folder: TrainerFolder, arguments: Arguments) -> dict[str, Any]:
    """Return the config keys that a Trainer's arguments become, except for the learning rate."""
    if arguments.missing:
        return {}
    taken = batch_settings(folder, arguments)
    taken["max_grad_norm"] = max(0.0, float(arguments.number("max_grad_norm", 0.0)))
    taken["seed"] = max(0, int(arguments.number("seed", 42)))
    length = next((int(arguments.number(name, 0)) for name in LENGTHS if arguments.number(name, 0) >= 2), None)
    return taken if length is None else {**taken, "max_length": length}


def optimizer_arguments(arguments: Arguments) -> dict[str, Any]:
    """Return the arguments of the optimizer, for a run whose moments start afresh."""
    if arguments.missing:
        return {}
    return {
        "learning_rate": arguments.number("learning_rate", 5e-5),
        "weight_decay": arguments.number("weight_decay", 0.0),
        "betas": [arguments.number("adam_beta1", 0.9), arguments.number("adam_beta2", 0.999)],
        "eps": arguments.number("adam_epsilon", 1e-8),
    }


def router_loss(arguments: Arguments, base: Path) -> Iterator[str]:
    """Yield the term that a Trainer added to the loss of a mixture of experts to keep its routers balanced.

    TRL adds it if the model's config has such a term, transformers' Trainer if the config asks for it.

    Args:
        base: folder of the base model.
    """
    read: Any = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    model = read.get_text_config()
    own: Any = getattr(model, "router_aux_loss_coef", None)
    if ROUTER_LOSS in arguments.values:
        factor = arguments.number(ROUTER_LOSS, own or 0.0) if hasattr(model, "output_router_logits") else 0.0
    else:
        factor = own if getattr(model, "output_router_logits", False) else 0.0
    if factor:
        yield f"not taken: {ROUTER_LOSS} {factor:g} (a run's loss has no term for the routers)"


def left_out(arguments: Arguments) -> Iterator[str]:
    """Yield the arguments that are not taken over, each with its reason."""
    if arguments.missing:
        return
    epochs = arguments.number("num_train_epochs", 1)
    if epochs != 1 and arguments.number("max_steps", -1) <= 0:
        yield f"num_train_epochs {epochs:g} (epochs here are passes over each new file)"
    for name, reason in LEFT.items():
        value = arguments.values.get(name)
        if value and value not in USUAL:
            yield f"{name} {value} ({reason})"
    yield from (f"{name} False ({why})" for name, why in WITHOUT.items() if arguments.values.get(name) is False)
