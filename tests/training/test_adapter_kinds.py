"""Every kind of adapter that a config can ask for goes on exactly, and loads in stock PEFT as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from onward.config import Config
from onward.errors import ConfigError, ModelError
from onward.training.checkpoints.checkpoint import Contents, Facts, Manifest, write_checkpoint
from onward.training.checkpoints.loading import load_state
from onward.training.layers.fused_lora import FusedLoraLinear
from onward.training.layers.twin import with_weights
from onward.training.measuring.handover import measure
from onward.training.measuring.probe import Probed, probe_batch
from onward.training.model.adapter import ADAPTER_WEIGHTS
from onward.training.model.base import ADAPTER_CONFIG
from onward.training.model.load import build_model
from onward.training.model.roundtrip import prove_roundtrip
from onward.training.model.spec import ModelSpec
from onward.training.seeds import fold, seeded
from onward.training.state import TrainState
from onward.training.steps.loss import TargetLoss

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "vocab_size": 64,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"use_dora": True, "targets": "all-linear"}),
    ("gpt2", {"use_dora": True, "dropout": 0.0}),
    ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {".*mlp.*": 5.0}}),
    ("qwen2", {"bias": "all"}),
    ("qwen2", {"bias": "lora_only", "targets": ["q_proj", "o_proj"]}),
    ("gpt2", {"bias": "all", "modules_to_save": ["ln_f"]}),
    ("llama", {"modules_to_save": ["embed_tokens"]}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("qwen2", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    ("gpt2", {"modules_to_save": ["wte"]}),
    ("llama", {"layers": [1], "targets": "all-linear"}),
    ("gpt2", {"layers": [0], "targets": ["c_attn"]}),
    ("llama", {"trainable_tokens": [5, 3]}),
    ("qwen2", {"trainable_tokens": [5, 3], "use_dora": True}),
    ("gpt2", {"trainable_tokens": [5]}),
    ("qwen2", {"trainable_tokens": {"lm_head": [3, 5]}}),
    ("llama", {"init": "gaussian"}),
    ("llama", {"init": "orthogonal", "targets": ["q_proj", "v_proj"]}),
    ("qwen2", {"targets": ["q_proj", "lm_head", "embed_tokens"]}),
    ("qwen2_moe", {"target_parameters": STACKED, "dropout": 0.0}),
    ("gpt_oss", {"target_parameters": STACKED, "targets": ["q_proj"], "dropout": 0.0, "modules_to_save": ["router"]}),
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a random small model of a family."""
    root = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        if not (root / name).is_dir():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = AutoConfig.for_model(name, **SMALL | FAMILIES[name])
                AutoModelForCausalLM.from_config(config).float().save_pretrained(root / name)
        return root / name

    return make


def config_of(base: Path, lora: dict[str, Any], **settings: Any) -> Config:
    """Return the config of a run on a base."""
    some = ["c_attn"] if base.name == "gpt2" else ["q_proj", "down_proj"]
    shape = {"rank": 2, "dropout": 0.1, "targets": some, **lora}
    return Config.model_validate({"model": str(base), "lora": shape, **settings})


def take_steps(state: TrainState, config: Config, steps: int, dtype: torch.dtype = torch.float32) -> None:
    """Take optimizer steps on rows and with dropout that follow from the step's number."""
    loss = TargetLoss(state.model, CPU, dtype)
    for _ in range(steps):
        with seeded(fold(config.seed, state.step), CPU):
            loss(probe_batch(state.step, SMALL["vocab_size"])).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.counters.step += 1


def write(folder: Path, state: TrainState, config: Config, parent: Manifest | None = None) -> Manifest:
    """Write the state as a checkpoint; without one before it, it is proven to load back."""
    facts = Facts("a run", {"name": "base", "digest": "d"}, "t", {"device": "cpu"}, {})
    view = state.view()
    return write_checkpoint(
        folder, Contents(state.model, view, config, measure(view, Probed(1.0, "")), facts, parent=parent)
    )


def stock_model(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a checkpoint as anyone would."""
    if (folder / ADAPTER_CONFIG).is_file():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def named(kind: object) -> str | None:
    """Name a test after what its adapter is asked for."""
    return "-".join(kind) if isinstance(kind, dict) else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "lora"), KINDS, ids=named)
def test_a_kind_goes_on_exactly_and_loads_in_stock_peft(
    name: str, lora: dict[str, Any], family: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stopped and loaded between two steps, the state is that of no stop; PEFT computes from its files what it does."""
    base = family(name)
    config = config_of(base, lora)
    whole = TrainState.start(build_model(ModelSpec(config, base, CPU, torch.float32)), config)
    fresh = stock.logits(whole.model)
    take_steps(whole, config, 1)
    first = write(tmp_path / "checkpoint-1", whole, config)
    loaded = load_state(tmp_path / "checkpoint-1", first, ModelSpec(config, base, CPU, torch.float32))
    assert whole.view().digest() == loaded.view().digest()
    for state, folder in ((whole, "checkpoint-2"), (loaded, "checkpoint-3")):
        take_steps(state, config, 1)
        write(tmp_path / folder, state, config, first)
    assert whole.view().digest() == loaded.view().digest()
    assert len(whole.parameters) == len(whole.view().moments)  # every trained weight has got a gradient
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "checkpoint-2" / file).read_bytes() == (tmp_path / "checkpoint-3" / file).read_bytes()
    trained = stock.logits(whole.model)
    assert not torch.equal(fresh, trained)
    torch.testing.assert_close(trained, stock.logits(stock_model(base, tmp_path / "checkpoint-2")), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "lora", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"trainable_tokens": [3], "use_dora": True}], ids=named
)
def test_what_is_trained_beside_an_adapter_is_float32_on_a_bfloat16_base(
    lora: dict[str, Any], family: Callable[[str], Path], tmp_path: Path
) -> None:
    """Biases, whole modules and rows of tokens keep their bits through a checkpoint."""
    base = family("qwen2")
    config = config_of(base, lora, dtype="bfloat16")
    state = TrainState.start(build_model(ModelSpec(config, base, CPU, torch.bfloat16)), config)
    assert {torch.float32} == {weight.dtype for weight in state.parameters.values()}
    take_steps(state, config, 2, torch.bfloat16)
    manifest = write(tmp_path / "checkpoint-2", state, config)
    loaded = load_state(tmp_path / "checkpoint-2", manifest, ModelSpec(config, base, CPU, torch.bfloat16))
    assert state.view().digest() == loaded.view().digest()


@pytest.mark.parametrize(
    "lora",
    [{"modules_to_save": ["lm_head"]}, {"trainable_tokens": [3, 5]}, {"use_dora": True, "bias": "all"}],
    ids=named,
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_loss_and_gradients_are_those_of_plain_rows(
    name: str, lora: dict[str, Any], family: Callable[[str], Path]
) -> None:
    """The head's part of a step, computed without all logits, is that of PEFT's own forward pass, row by row."""
    if name == "llama" and "bias" in lora:
        lora = {"use_dora": True}  # it has no biases
    config = config_of(family(name), {**lora, "dropout": 0.0})
    built = build_model(ModelSpec(config, family(name), CPU, torch.float32))
    batch = probe_batch(0, SMALL["vocab_size"])
    parameters = {key: weight for key, weight in built.named_parameters() if weight.requires_grad}
    TargetLoss(built, CPU, torch.float32)(batch).backward()
    ours = {key: weight.grad for key, weight in parameters.items()}
    built.zero_grad()
    for row in batch.rows:
        ids = torch.from_numpy(row.ids)
        logits = built(input_ids=ids[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    for key, weight in parameters.items():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, ours[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [["layers.1.", r"^model\.norm"], ["lm_head"]])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_part_of_a_whole_model_is_trained(
    name: str, train: list[str], family: Callable[[str], Path], tmp_path: Path
) -> None:
    """With `train` the rest stays the base's, bit for bit, and the checkpoint is a whole model all the same."""
    base = family(name)
    config = Config.model_validate({"model": str(base), "method": "full", "train": train})
    state = TrainState.start(build_model(ModelSpec(config, base, CPU, torch.float32)), config)
    take_steps(state, config, 2)
    write(tmp_path / "checkpoint-2", state, config)
    stock_loader: Any = AutoModelForCausalLM
    loaded, info = stock_loader.from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert [] == [kind for kind, names in info.items() if names]
    before = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    changed = {name for name, weight in loaded.named_parameters() if not torch.equal(weight, before[name])}
    assert set(state.parameters) == changed
    assert 0 < len(changed) < len(before)
    prove_roundtrip(state.model, tmp_path / "checkpoint-2", whole=True)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"lora.layers": [0, 7]}, "lora.layers names 7"),
    ("llama", {"lora.layers": [7]}, "lora.layers names 7"),
    ("llama", {"lora.rank_pattern": {"nowhere": 3}}, "lora.rank_pattern names 'nowhere'"),
    ("llama", {"lora.alpha_pattern": {"nowhere": 3.0}}, "lora.alpha_pattern names 'nowhere'"),
    ("llama", {"lora.modules_to_save": ["score"]}, "lora.modules_to_save names 'score'"),
    ("llama", {"lora.bias": "all"}, "no such biases"),
    ("qwen2", {"lora.bias": "lora_only", "lora.targets": ["down_proj"]}, "no such biases"),
    ("llama", {"lora.trainable_tokens": [64]}, "which has 64 rows"),
    ("llama", {"lora.trainable_tokens": [3], "lora.modules_to_save": ["embed_tokens"]}, "trained fully"),
    ("qwen2_moe", {"lora.target_parameters": ["w1"], "lora.dropout": 0.0}, "experts.gate_up_proj"),
    ("llama", {"method": "full", "train": ["layers.9"]}, "matches no weight's name"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_what_a_model_has_nothing_for_is_refused(
    name: str, settings: dict[str, Any], message: str, family: Callable[[str], Path]
) -> None:
    """A name that PEFT would pass over is an error before the first step, with the names that there are."""
    base = family(name)
    values: dict[str, Any] = {"model": str(base), "lora": {"rank": 2}}
    for key, value in settings.items():
        section, dot, rest = key.partition(".")
        if dot:
            values[section][rest] = value
        else:
            values[key] = value
    with pytest.raises((ConfigError, ModelError), match=message):
        build_model(ModelSpec(Config.model_validate(values), base, CPU, torch.float32))


def test_only_plain_layers_are_fused(family: Callable[[str], Path]) -> None:
    """Where the one node cannot compute the same, PEFT's own module does."""
    for lora, fused in (({}, 14), ({"use_dora": True}, 0), ({"bias": "all"}, 8)):
        built = build_model(
            ModelSpec(
                config_of(family("qwen2"), {"targets": "all-linear", **lora}), family("qwen2"), CPU, torch.float32
            )
        )
        assert fused == sum(isinstance(part, FusedLoraLinear) for part in built.modules())


def test_experts_are_computed_apart_from_other_threads(family: Callable[[str], Path]) -> None:
    """A step, and the probe's copy of the model, find no expert of the step before in a cache of the process."""
    base = family("qwen2_moe")
    config = config_of(base, {"target_parameters": STACKED, "dropout": 0.0})
    alone, beside = (
        TrainState.start(build_model(ModelSpec(config, base, CPU, torch.float32)), config) for _ in range(2)
    )
    copied = with_weights(beside.model, beside.snapshot().weights)
    ids = torch.arange(3, 3 + stock.LENGTH)[None]
    expected = copied(input_ids=ids).logits
    take_steps(alone, config, 3)
    with torch.nn.utils.parametrize.cached():  # as another thread holds it while it measures with PEFT's own wrapper
        take_steps(beside, config, 3)
        assert torch.equal(expected, copied(input_ids=ids).logits)
    assert alone.view().digest() == beside.view().digest()
