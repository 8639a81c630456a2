"""One process of the usual recipe at its best: a stock Trainer that continues from a checkpoint with one file.

`stock.py '{"model": ..., "rows": ..., "out": ..., "method": "lora" | "full", "steps": ..., "resume": null}'`.
`steps` is `max_steps`: those so far and this file's. It says `first step` on stderr; the last line of its output is
JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

BATCH, MAX_LENGTH = 8, 512


def read_rows(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return the rows of a file as token ids and labels, tokenized in one batch."""
    texts = [json.loads(line)["text"] + tokenizer.eos_token for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {"input_ids": ids, "labels": ids} for ids in tokenizer(texts, truncation=True, max_length=MAX_LENGTH).input_ids
    ]


class TokenRows:
    """Rows that Onward tokenized, mapped into memory: a peer that resumes need not tokenize them again."""

    def __init__(self, folder: Path) -> None:
        from onward.data.tokenized import TokenizedFile

        self._file = TokenizedFile.open(folder, verify=False)

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self._file.row(index).ids.tolist()
        return {"input_ids": ids, "labels": ids}


def load_model(job: dict[str, Any]) -> Any:
    """Return the model to train; a resume puts the checkpoint's weights in."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if job["method"] == "full":
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train one file and save; return when each step began and ended, on the clock that all processes share."""
    import torch
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    began: list[float] = []
    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not began:
                print("first step", file=sys.stderr, flush=True)
            began.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.monotonic())

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = Path(job["rows"])
    trainer = Trainer(
        load_model(job),
        TrainingArguments(
            output_dir=job["out"], per_device_train_batch_size=BATCH, max_steps=job["steps"], learning_rate=2e-4,
            lr_scheduler_type="constant", optim="adamw_torch_fused", weight_decay=0.0, logging_steps=10, report_to=[],
            save_strategy="steps", save_steps=job["steps"], save_total_limit=1, bf16=torch.cuda.is_available(),
            ignore_data_skip=job.get("ignore_data_skip", False), disable_tqdm=True,
        ),
        train_dataset=TokenRows(rows) if rows.is_dir() else read_rows(rows, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=job["resume"])
    return {"began": began, "ended": ended, "checkpoint": str(Path(job["out"]) / f"checkpoint-{job['steps']}")}


def main() -> None:
    """Run as one process of the recipe."""
    print(json.dumps(train(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
