"""A stock Trainer, and the tools on it, go on from our checkpoint, save, evaluate, and are adopted again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from onward import Run

METHODS = ("lora", "full")
SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "max_length": 128,
    "learning_rate": 1e-3,
    "save_steps": 3,
    "lora": {"rank": 4, "dropout": 0.1},
}
STEPS, MORE = 6, 4


@pytest.fixture(scope="module")
def checkpoints(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of ours for each method, after one file."""
    root = tmp_path_factory.mktemp("ours")
    file = tiny.write_jsonl(root / "file.jsonl", tiny.chat_rows(2 * STEPS))
    found: dict[str, Path] = {}
    for method in METHODS:
        Run.create(root / method, str(model), method=method, **SETTINGS).train(file)
        found[method] = root / method / f"current_model/checkpoint-{STEPS}"
    return found


def fresh(model: Path, checkpoint: Path, method: str) -> Any:
    """Return the model that a person hands to a Trainer to resume from a checkpoint."""
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    if method == "full":
        return base
    adapter = LoraConfig.from_pretrained(str(checkpoint))
    adapter.inference_mode = False
    return get_peft_model(base, adapter)


class OwnSteps(TrainerCallback):
    """As docs/adopting.md shows it: a Trainer's arguments win over the steps that a checkpoint names."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the checkpoint was read."""
        state.compute_steps(args, state.max_steps)


def plain(model: Path, checkpoint: Path, method: str, output: Path, **settings: Any) -> Any:
    """A Trainer whose arguments are all at their defaults, but for the step to stop at and where it runs."""
    defaults = {key: getattr(TrainingArguments, key) for key in stock.ARGUMENTS if key not in ("use_cpu", "report_to")}
    trainer = stock.trainer(
        fresh(model, checkpoint, method), output, rows=64, max_steps=STEPS + MORE, **defaults | settings
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def evaluating(model: Path, checkpoint: Path, method: str, output: Path) -> Any:
    """A Trainer that saves and evaluates often, and has callbacks with a state of their own."""
    settings: dict[str, Any] = {
        "max_steps": STEPS + MORE, "save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch",
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "num_train_epochs": 10,
    }  # fmt: skip
    trainer = stock.trainer(fresh(model, checkpoint, method), output, rows=8, **settings)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=9))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [STEPS + 2, STEPS + MORE] == [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return trainer


def llama_factory(model: Path, checkpoint: Path, method: str, output: Path) -> Any:
    """As LLaMA-Factory resumes: the newest checkpoint of the output folder, then `save_model` and `save_state`."""
    assert str(checkpoint) == get_last_checkpoint(str(checkpoint.parent))
    trainer = plain(model, checkpoint, method, output)
    trainer.save_model()
    trainer.save_state()
    return trainer


def axolotl(model: Path, checkpoint: Path, method: str, output: Path) -> Any:
    """As Axolotl resumes (`auto_resume_from_checkpoints`): the highest number behind `checkpoint-`."""
    found = [path for path in checkpoint.parent.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    newest = sorted(found, key=lambda path: int(path.name.split("-")[-1]))[-1]
    trainer = plain(model, newest, method, output, save_steps=MORE // 2, callbacks=[OwnSteps()])
    assert (output / f"checkpoint-{STEPS + MORE // 2}").is_dir()
    return trainer


def supervised(model: Path, checkpoint: Path, method: str, output: Path) -> Any:
    """TRL's SFTTrainer, which makes the adapter itself."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    adapter = LoraConfig.from_pretrained(str(checkpoint)) if method == "lora" else None
    if adapter is not None:
        adapter.inference_mode = False
    arguments = trl.SFTConfig(
        str(output), max_steps=STEPS + MORE, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_length=64,
        dataset_num_proc=None,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(tiny.chat_rows(80, seed=5)),
        processing_class=tiny.byte_tokenizer(),
        peft_config=adapter,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


GOING_ON = [(plain, "lora"), (evaluating, "full"), (llama_factory, "full"), (axolotl, "lora"), (supervised, "lora")]


@pytest.mark.parametrize(("tool", "method"), GOING_ON, ids=lambda value: getattr(value, "__name__", value))
def test_a_trainer_goes_on_saves_and_is_adopted_again(
    tool: Callable[..., Any], method: str, model: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """It trains on from our step and saves; what it saved becomes a run with its weights, moments and step."""
    trainer = tool(model, checkpoints[method], method, tmp_path / "stock")
    saved = tmp_path / f"stock/checkpoint-{STEPS + MORE}"
    assert {"TrainerControl", "EarlyStoppingCallback"} == set(
        json.loads((saved / "trainer_state.json").read_text())["stateful_callbacks"]
    )
    run = Run.adopt(saved, tmp_path / "run", str(model))
    assert STEPS + MORE == run.status()["global_step"]
    assert run.verify().ok
    assert (64 if tool is supervised else 1024) == run.config.max_length
    state = stock.open_state(tmp_path / "run")
    if not trainer.args.load_best_model_at_end:
        stock.assert_equal(stock.trained(trainer.model), stock.trained(state.model))
    stock.assert_equal(stock.moments(trainer.model, trainer.optimizer), stock.moments(state.model, state.optimizer))
