"""One side's optimizer steps, in a process of its own: `steps.py SIDE MODEL ROWS STEPS METHOD [SAVE_STEPS]`.

All sides train the same tokens in the same batches from the same weights: AdamW, constant learning rate, no dropout,
float32 on a CPU and bfloat16 on a GPU. The last line of the output is JSON: seconds, tokens and loss of every step.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import tune_process

from onward import Run
from onward.config import Config
from onward.data.plan.order import FilePlan
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.data.tokenized import TokenizedFile
from onward.data.tokenizer import TokenizerState
from onward.digest import sha256_file
from onward.events import StepTaken
from onward.training.device.environment import pick_dtype
from onward.training.model.load import build_model, load_tokenizer
from onward.training.model.spec import ModelSpec

BATCH, MAX_LENGTH, RATE = 8, 512, 2e-4
ON_GPU = torch.cuda.is_available()
PEERS = {
    "trainer": {},
    "trl": {},
    "trl grouped": {"train_sampling_strategy": "group_by_length"},
    "trl padding-free": {"padding_free": True, "max_length": None},
    "trl packing": {"packing": True, "max_length": 2 * MAX_LENGTH, "per_device_train_batch_size": 2},
}
"""Settings of transformers' Trainer and of TRL's SFTTrainer; the loss of the latter is computed in chunks."""

Record = dict[str, float]


def settings(model: Path, method: str, save_steps: int) -> dict[str, Any]:
    """Return Onward's settings."""
    return {
        "model": str(model), "method": method, "batch_size": BATCH, "max_length": MAX_LENGTH, "learning_rate": RATE,
        "warmup_steps": 0, "save_steps": save_steps, "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
        "holdout": 0, "evaluation": {"share": 0}, "over_length": "truncate",  # as the peers' rows are
    }  # fmt: skip


def train_onward(folder: Path, rows: Path, steps: int, values: dict[str, Any]) -> list[Record]:
    """Train with Onward: everything that a run does, including the ledger."""
    tune_process()
    records: list[Record] = []
    run = Run.create(folder / "run", values.pop("model"), **values)
    last = time.perf_counter()

    class Enough(BaseException):
        pass

    def observe(event: object) -> None:
        nonlocal last
        now = time.perf_counter()
        if isinstance(event, StepTaken):
            records.append({"seconds": now - last, "tokens": event.tokens, "loss": event.loss})
            if len(records) == steps:
                raise Enough
        last = now

    with contextlib.suppress(Enough):
        run.train(rows, observe=observe)
    return records


def examples(folder: Path, rows: Path, model: Path) -> list[dict[str, list[int]]]:
    """Return the rows as token ids and labels, in the order in which Onward trains them."""
    sha256 = sha256_file(rows)
    tokenizer = RowTokenizer(TokenizerState.of(load_tokenizer(model)), MAX_LENGTH)
    assert tokenize_file(rows, folder / "tokens", sha256, tokenizer).ok
    tokens = TokenizedFile.open(folder / "tokens")
    plan = FilePlan(sha256, tokens.rows, BATCH, 1, 0)
    order = [index for step in range(plan.steps) for _, index in plan.rows_at(step)]
    found = []
    for index in order:
        row = tokens.row(index)
        labels = [token if target else -100 for token, target in zip(row.ids, row.targets, strict=True)]
        found.append({"input_ids": row.ids.tolist(), "labels": [int(label) for label in labels]})
    return found


def train_peer(side: str, folder: Path, rows: Path, steps: int, values: dict[str, Any]) -> list[Record]:
    """Train with a peer at the settings of `PEERS`."""
    import transformers
    from datasets import Dataset
    from transformers import TrainerCallback

    model_folder, save_steps = Path(values["model"]), values["save_steps"]
    tokenizer = load_tokenizer(model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = Dataset.from_list(examples(folder, rows, model_folder))
    own = PEERS[side]
    common = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": BATCH, "max_steps": steps,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused",
        "logging_steps": 1, "report_to": [], "gradient_checkpointing": False, "bf16": ON_GPU, "disable_tqdm": True,
        "save_strategy": "steps" if save_steps <= steps else "no", "save_steps": save_steps, "save_total_limit": 1,
        "train_sampling_strategy": "sequential", "weight_decay": 0.0, "max_grad_norm": 1.0,
    }  # fmt: skip
    model = peer_model(folder, values)
    if side == "trainer":
        arguments = transformers.TrainingArguments(**common)
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collator)
    else:
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**{**common, "max_length": MAX_LENGTH, **own})
        trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    records: list[Record] = []
    counted = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens = int(mask.sum()) if mask is not None else int(inputs["input_ids"].numel())
        records.append({"seconds": 0.0, "tokens": tokens, "loss": 0.0})
        return counted(model, inputs, *rest)

    class Clock(TrainerCallback):
        last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            records[-1]["seconds"] = now - self.last
            self.last = now

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                records[-1]["loss"] = float(logs["loss"])

    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer.add_callback(Clock())
    trainer.train()
    return records


def peer_model(folder: Path, values: dict[str, Any]) -> torch.nn.Module:
    """Return the model with the weights that Onward begins with, as transformers and PEFT load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from onward.training.model.weights import save_weights

    base = Path(values["model"])
    dtype = pick_dtype("auto", torch.device("cuda" if ON_GPU else "cpu"))
    if values["method"] == "full":
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    begun = build_model(ModelSpec(Config.model_validate(values), base, torch.device("cpu"), torch.float32))
    (folder / "adapter").mkdir()
    save_weights(begun, dict(begun.named_parameters()), folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)


def multiply(rows: Path, steps: int, values: dict[str, Any]) -> list[Record]:
    """Time only the matrix multiplications that the steps cannot do without: the machine's limit.

    Per linear layer: forward and gradient of the input, and those of its two adapter matrices with their gradients;
    the head for target tokens. For a full model the gradient of the weight too.
    """
    tune_process()  # the limit must not be the allocator's
    model = build_model(
        ModelSpec(Config.model_validate(values), Path(values["model"]), torch.device("cpu"), torch.float32)
    )
    device = torch.device("cuda" if ON_GPU else "cpu")
    dtype = pick_dtype("auto", device)
    shapes = [tuple(m.weight.shape) for name, m in model.named_modules() if _is_base_linear(name, m)]
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr,operator]
    rank = 0 if values["method"] == "full" else 16
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        every = examples(Path(folder), rows, Path(values["model"]))
    for step in range(steps):
        batch = every[step * BATCH : (step + 1) * BATCH]
        tokens = sum(len(row["input_ids"]) for row in batch)
        targets = sum(label >= 0 for row in batch for label in row["labels"])
        seconds = 0.0
        for out, into in shapes:
            is_head = out == vocabulary
            seen, adapter = (targets, 0) if is_head else (tokens, rank)
            seconds += _layer(seen, out, into, adapter, rank == 0, device, dtype)
        records.append({"seconds": seconds, "tokens": tokens, "loss": 0.0})
    return records


def _is_base_linear(name: str, module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear and "lora_" not in name


def _layer(
    tokens: int, out: int, into: int, rank: int, trains_weight: bool, device: torch.device, dtype: torch.dtype
) -> float:
    make = {"device": device, "dtype": dtype}
    x, grad = torch.randn(tokens, into, **make), torch.randn(tokens, out, **make)
    weight = torch.randn(out, into, **make)
    down, up = torch.randn(max(rank, 1), into, **make), torch.randn(out, max(rank, 1), **make)
    _synchronize()
    begun = time.perf_counter()
    x @ weight.T
    grad @ weight
    if trains_weight:
        grad.T @ x
    if rank:
        inner, inner_grad = x @ down.T, grad @ up
        inner @ up.T
        inner_grad @ down
        inner_grad.T @ x
        grad.T @ inner
    _synchronize()
    return time.perf_counter() - begun


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def main() -> None:
    """Measure one side and print its records."""
    side, model, rows, steps, method = sys.argv[1:6]
    save_steps = int(sys.argv[6]) if len(sys.argv) > 6 else 10**6
    values = settings(Path(model), method, save_steps)
    with tempfile.TemporaryDirectory() as folder:
        if side == "onward":
            records = train_onward(Path(folder), Path(rows), int(steps), values)
        elif side == "limit":
            records = multiply(Path(rows), int(steps), values)
        else:
            records = train_peer(side, Path(folder), Path(rows), int(steps), values)
    print(json.dumps(records))


if __name__ == "__main__":
    main()
