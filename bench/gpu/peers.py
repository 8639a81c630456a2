"""The peers at their best, on rows that are tokens already: TRL's SFTTrainer and transformers' Trainer."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from shapes import LENGTH, ROWS

RATE = 2e-4


def peer_trainer(side: str, model: Any, rows: list[Any], steps: int, folder: str) -> tuple[Any, dict[str, Any]]:
    """Return a trainer over rows of tokens, and the settings that make it fast.

    Args:
        side: `trl packed`, `trl padding-free` or `trainer`.

    Raises:
        ImportError: a package that it needs is missing.
    """
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    data = Dataset.from_list([{"input_ids": row.ids.tolist(), "labels": row.ids.tolist()} for row in rows])
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model.requires_grad_(False)
    adapted = get_peft_model(model, adapter)
    own = _fastest(side)
    common = {
        "output_dir": folder, "per_device_train_batch_size": ROWS, "max_steps": steps, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused", "report_to": [],
        "logging_steps": 1 << 20, "gradient_checkpointing": False, "bf16": torch.cuda.is_available(),
        "disable_tqdm": True, "save_strategy": "no", "weight_decay": 0.0, "max_grad_norm": 1.0, **own,
    }  # fmt: skip
    if side == "trainer":
        import transformers

        arguments = transformers.TrainingArguments(**_known(transformers.TrainingArguments, common))
        collate = _padded
        return transformers.Trainer(adapted, arguments, train_dataset=data, data_collator=collate), own
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **_known(SFTConfig, {**common, "dataset_kwargs": {"skip_prepare_dataset": "packed" not in side}})
    )
    tokenizer = _tokenizer()
    return SFTTrainer(adapted, arguments, train_dataset=data, processing_class=tokenizer), own


def _fastest(side: str) -> dict[str, Any]:
    if side == "trainer":
        return {}
    own: dict[str, Any] = {"padding_free": True, "max_length": None}
    if "packed" in side:
        own = {"packing": True, "max_length": LENGTH}
    if importlib.util.find_spec("liger_kernel") is not None:
        own["use_liger_kernel"] = True
    return own


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a release of a library knows."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return rows padded to the longest, as a Trainer takes them."""
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": mask}


def _tokenizer() -> Any:
    import tiny

    return tiny.byte_tokenizer()
