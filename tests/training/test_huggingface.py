"""A checkpoint of Onward is one of Hugging Face's: stock classes read all of it and go on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import stock
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from onward import Run
from onward.training.checkpoints.huggingface import LOG_TAIL, tokenizer_files
from onward.training.optimizers import ADAMW

METHODS = ("lora", "full")
LENGTHS = (80, 31)
STEPS = 56
SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "max_length": 128,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "betas": [0.85, 0.97],
    "log_steps": 1,
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
}
TRAINER_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
WEIGHT_FILES = {
    "lora": {"adapter_model.safetensors", "adapter_config.json"},
    "full": {"model.safetensors", "config.json"},
}


@dataclass
class Witness(TrainerCallback):
    """What a Trainer had loaded when it was about to take its first step."""

    step: int = -1
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy everything."""
        self.step = state.global_step
        self.weights = stock.trained(kwargs["model"])
        self.moments = stock.moments(kwargs["model"], kwargs["optimizer"])
        self.rates = [group["lr"] for group in kwargs["optimizer"].param_groups]


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run per method, trained on two files."""
    root = tmp_path_factory.mktemp("runs")
    files = [tiny.write_jsonl(root / f"{count}.jsonl", tiny.chat_rows(count, seed=count)) for count in LENGTHS]
    for method in METHODS:
        Run.create(root / method, str(model), method=method, **SETTINGS).train(*files)
    return {method: root / method for method in METHODS}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Every kind of trained weights."""
    return request.param


@pytest.fixture
def current(runs: dict[str, Path], method: str) -> Path:
    """The `current_model/` of a trained run."""
    return runs[method] / "current_model"


@pytest.fixture
def resumed(model: Path, current: Path, method: str, tmp_path: Path) -> tuple[Trainer, Witness]:
    """A stock Trainer that went on from the run's checkpoint by one step, and what it saw before that step."""
    checkpoint = current / f"checkpoint-{STEPS}"
    fresh: Any = AutoModelForCausalLM.from_pretrained(model)
    if method == "lora":
        adapter = LoraConfig.from_pretrained(str(checkpoint))
        adapter.inference_mode = False
        fresh = get_peft_model(fresh, adapter)
    witness = Witness()
    settings = {"max_steps": STEPS + 1, "lr_scheduler_type": "constant", "learning_rate": 1e-3, "callbacks": [witness]}
    trainer = stock.trainer(fresh, tmp_path / "stock", rows=300, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer, witness


def test_the_stock_trainer_starts_from_our_state(
    runs: dict[str, Path], method: str, resumed: tuple[Trainer, Witness]
) -> None:
    """Before its first step it has our step, every weight, every Adam moment and counter, and the learning rate."""
    state = stock.open_state(runs[method])
    witness = resumed[1]
    assert (STEPS, STEPS) == (state.step, witness.step)
    stock.assert_equal(stock.trained(state.model), witness.weights)
    stock.assert_equal(stock.moments(state.model, state.optimizer), witness.moments)
    assert [1e-3, 1e-3] == witness.rates


def test_the_stock_trainer_goes_on_from_our_step(current: Path, resumed: tuple[Trainer, Witness]) -> None:
    """It takes exactly one step more, with our Adam: every counter is one higher and every weight moved."""
    trainer, witness = resumed
    model = trainer.model
    assert model is not None
    assert trainer.optimizer is not None
    assert STEPS + 1 == trainer.state.global_step
    after = stock.moments(model, trainer.optimizer)
    assert {STEPS + 1} == {int(after[name]) for name in after if name.endswith(".step")}
    weights = stock.trained(model)
    assert [] == [name for name in weights if torch.equal(weights[name], witness.weights[name])]
    assert STEPS + 1 == trainer.lr_scheduler.last_epoch  # type: ignore[union-attr]


def test_peft_reads_the_adapter(model: Path, runs: dict[str, Path]) -> None:
    """`PeftModel.from_pretrained` on `current_model` computes the logits of the run's own model."""
    base = AutoModelForCausalLM.from_pretrained(model)
    untrained = stock.logits(base)
    adapted = PeftModel.from_pretrained(base, runs["lora"] / "current_model")
    own = stock.open_state(runs["lora"])
    assert torch.equal(stock.logits(own.model), stock.logits(adapted))
    assert not torch.equal(untrained, stock.logits(adapted))


def test_transformers_reads_the_whole_model(model: Path, runs: dict[str, Path]) -> None:
    """`AutoModelForCausalLM.from_pretrained` on `current_model` has the run's weights, all of them trained."""
    loaded = AutoModelForCausalLM.from_pretrained(runs["full"] / "current_model")
    own = stock.open_state(runs["full"])
    stock.assert_equal(stock.trained(own.model), stock.trained(loaded))
    assert torch.equal(stock.logits(own.model), stock.logits(loaded))
    base = stock.trained(AutoModelForCausalLM.from_pretrained(model))
    assert [] == [name for name, weight in stock.trained(loaded).items() if torch.equal(weight, base[name])]


def test_the_tokenizer_is_the_base_models(model: Path, current: Path) -> None:
    """`AutoTokenizer.from_pretrained` on `current_model` encodes as the base's and has its chat template."""
    ours, base = AutoTokenizer.from_pretrained(current), AutoTokenizer.from_pretrained(model)
    assert base.chat_template == ours.chat_template == tiny.CHATML
    for row in tiny.chat_rows(5):
        text = base.apply_chat_template(row["messages"], tokenize=False)
        assert text == ours.apply_chat_template(row["messages"], tokenize=False)
        assert base(f"{text} ünïcode")["input_ids"] == ours(f"{text} ünïcode")["input_ids"]
    assert (base.eos_token, base.pad_token, len(base)) == (ours.eos_token, ours.pad_token, len(ours))


def test_all_templates_of_a_tokenizer_are_kept(tmp_path: Path) -> None:
    """A template for tools is not lost on the way into a checkpoint, whose files all lie in one folder."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": "{{ tools }}" + tiny.CHATML}
    for name, data in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_bytes(data)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_every_file_is_there_once(current: Path, method: str) -> None:
    """One checkpoint, named by its step; every file of it is also at the root, as a hard link to the same bytes."""
    checkpoint = current / f"checkpoint-{STEPS}"
    assert [checkpoint] == [path for path in current.iterdir() if path.is_dir()]
    names = {path.name for path in checkpoint.iterdir()}
    assert TRAINER_FILES | TOKENIZER_FILES | WEIGHT_FILES[method] <= names
    assert names == {path.name for path in current.iterdir() if path.is_file()} | {"onward.json"}
    assert [] == [name for name in names - {"onward.json"} if not (current / name).samefile(checkpoint / name)]


@pytest.fixture
def nothing_allowed() -> Iterator[None]:
    """No class is allow-listed for `torch.load`, whatever libraries did at import."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(allowed)


@pytest.mark.usefixtures("nothing_allowed")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_saved_state_is_plain_data(current: Path, name: str) -> None:
    """`torch.load(weights_only=True)` reads it with nothing allow-listed: what is loaded holds no code."""
    assert torch.load(current / name, weights_only=True)


def test_the_trainer_state_is_cumulative_and_bounded(current: Path) -> None:
    """`TrainerState` reads it: the step of the whole run, and only the newest entries of the log."""
    state = TrainerState.load_from_json(str(current / "trainer_state.json"))
    assert STEPS == state.global_step
    assert list(range(STEPS - LOG_TAIL + 1, STEPS + 1)) == [entry["step"] for entry in state.log_history]
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm"} == set(state.log_history[-1])
    assert (1.0, 2, 1) == (state.epoch, state.train_batch_size, state.num_train_epochs)
    last = (LENGTHS[-1] + 1) // 2
    assert [(last - 1) / last, 1.0] == [entry["epoch"] for entry in state.log_history[-2:]], "as a Trainer counts them"


def test_weights_are_float32_by_name(current: Path, method: str) -> None:
    """The weights file holds float32 under the names that PEFT and transformers use."""
    (path,) = (current / name for name in WEIGHT_FILES[method] if name.endswith(".safetensors"))
    weights = load_file(path)
    assert {torch.float32} == {weight.dtype for weight in weights.values()}
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_A" if method == "lora" else "model.embed_tokens"
    assert f"{prefix}.weight" in weights
    config = json.loads((current / ("adapter_config.json" if method == "lora" else "config.json")).read_text())
    assert ("LORA" if method == "lora" else "llama") == config.get("peft_type", config.get("model_type"))


MODELS = {
    "norms": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "query and key norms": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "layer norms": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
}
SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("kind", MODELS)
def test_parameter_groups_are_those_of_the_stock_trainer(kind: str, tmp_path: Path) -> None:
    """Weight decay falls on the same parameters, in the same order, so that `optimizer.pt` means the same to both."""
    model = MODELS[kind]()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = stock.trainer(model, tmp_path, weight_decay=0.1).create_optimizer()
    expected = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    assert expected == [[name for name, _ in group] for group in ADAMW.groups(model)]
    assert [0.1, 0.0] == [group["weight_decay"] for group in optimizer.param_groups]
    assert all(expected)
