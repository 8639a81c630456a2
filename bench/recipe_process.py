"""One process of the usual recipe: a file is trained by an unchanged Trainer, and what it did is printed as JSON.

`bench/recipe.py` starts it with a `Job` as JSON; the result is a `FileResult`.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

START = "start.safetensors"
"""The initial adapter of a run, kept next to the result."""


@dataclass(frozen=True)
class Settings:
    """What users of the recipe set; the rest is the Trainer's default."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.1
    batch_size: int = 8
    epochs: int = 1
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One process of the recipe: which rows it trains, and what it continues from."""

    base: str
    file: str
    out: str
    settings: Settings
    schedule: str
    order: str
    newest_by: str
    max_steps: int = -1
    stop_at: int | None = None
    resume: str | None = None


@dataclass(frozen=True)
class FileResult:
    """What one process did with one file; the fields are those of the module's docstring."""

    name: str
    rows: int
    rows_trained: int
    rows_repeated: int
    steps: int
    steps_due: int
    global_step: int
    resumed_from: str | None
    seconds: float
    learning_rates: list[float] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file, in its order."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def steps_due(path: Path, settings: Settings) -> int:
    """Return how many optimizer steps a file should take."""
    return math.ceil(len(read_texts(path)) / settings.batch_size) * settings.epochs


def checkpoints(out: Path, newest_by: str) -> list[Path]:
    """Return the checkpoints in a folder, sorted as people do it: as `text` or by `number`."""
    found = sorted(out.glob("checkpoint-*"))
    return found if newest_by == "text" else sorted(found, key=lambda path: int(path.name.split("-")[1]))


def run_job(job: Job) -> FileResult:
    """Run as one process of the recipe: train, `save_model`, `save_state`, keep the last checkpoint."""
    import torch

    torch.set_num_threads(1)
    trainer, rows_seen, rates = _stock_trainer(job)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=job.resume)
    seconds = time.perf_counter() - began
    trainer.save_model()
    trainer.save_state()
    for older in checkpoints(Path(job.out), job.newest_by)[:-1]:
        shutil.rmtree(older)
    counts = Counter(rows_seen)
    return FileResult(
        name=Path(job.file).name,
        rows=len(trainer.train_dataset),
        rows_trained=len(counts),
        rows_repeated=sum(count > job.settings.epochs for count in counts.values()),
        steps=len(rates),
        steps_due=steps_due(Path(job.file), job.settings),
        global_step=trainer.state.global_step,
        resumed_from=Path(job.resume).name if job.resume else None,
        seconds=round(seconds, 3),
        learning_rates=rates,
        kept=[path.name for path in checkpoints(Path(job.out), job.newest_by)],
    )


def _stock_trainer(job: Job):
    """Return a Trainer as anyone would set it up, and the lists in which it records rows and learning rates."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, set_seed

    class ObservedTrainer(Trainer):
        """The stock Trainer; records what each step is taken on and changes nothing."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            rows_seen.extend(inputs.pop("row").tolist())
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(model, inputs, num_items_in_batch)

    class StopAt(TrainerCallback):
        """Ends the process after a step, with a checkpoint, as an interruption right after a save would."""

        def on_step_end(self, args, state, control, **_):
            control.should_save = control.should_training_stop = state.global_step == job.stop_at
            return control

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = tokenizer([row["text"] + tokenizer.eos_token for row in rows], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels, "row": torch.tensor([row["row"] for row in rows])}

    rows_seen: list[int] = []
    rates: list[float] = []
    settings, out = job.settings, Path(job.out)
    set_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32), lora)
    if job.resume is None:
        model.save_pretrained(out)
        out.joinpath("adapter_model.safetensors").rename(out / START)
    trainer = ObservedTrainer(
        model=model,
        args=_arguments(job),
        train_dataset=[{"row": number, "text": text} for number, text in enumerate(read_texts(Path(job.file)))],
        data_collator=collate,
        callbacks=[StopAt()] if job.stop_at else None,
    )
    return trainer, rows_seen, rates


def _arguments(job: Job):
    """Return the Trainer's arguments that users set."""
    import torch
    from transformers import TrainingArguments

    settings = job.settings
    return TrainingArguments(
        output_dir=job.out,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        max_steps=job.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=job.schedule,
        train_sampling_strategy=job.order,
        seed=settings.seed,
        logging_steps=1,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )


def main() -> None:
    """Run the job given on the command line and print the result as JSON."""
    values = json.loads(sys.argv[1])
    print(json.dumps(asdict(run_job(Job(**{**values, "settings": Settings(**values["settings"])})))))


if __name__ == "__main__":
    main()
