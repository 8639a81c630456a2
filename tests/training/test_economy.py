"""Memory for time: layers computed again, only where a part would not fit, with the same bits always."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small
import torch
from peft import LoraConfig, get_peft_model
from rows import CPU, VOCABULARY, tiny_model
from torch import nn

from onward.config import Config
from onward.config.text import parse_config
from onward.data.plan.loader import Batch
from onward.data.plan.order import FilePlan, RowReference
from onward.data.tokenized import Row
from onward.errors import ConfigError, OnwardError
from onward.training.device.execution import Execution
from onward.training.device.memory import Usage
from onward.training.layers.attention import ROW_ATTENTION
from onward.training.layers.fused_lora import fuse_lora
from onward.training.state import Cursor, TrainState
from onward.training.steps.anchor import AnchorTerm
from onward.training.steps.economy import Learned
from onward.training.steps.memory import Profile
from onward.training.steps.model_memory import crude_of, kept_by_backward
from onward.training.trainer import Trainer
from onward.training.world import SingleProcess

LENGTHS = (9, 31, 5, 24)
NOTHING, PLENTY = Usage(1 << 40, 0, 0), Usage(1 << 40, 1 << 40, 0)
MODELS = [
    ("llama", ROW_ATTENTION, "lora", 0.3),
    ("llama", ROW_ATTENTION, "full", 0.0),
    ("llama", "sdpa", "lora", 0.3),
    ("gpt2", "eager", "full", 0.1),
    ("qwen3_moe", "sdpa", "lora", 0.0),
]
"""Type, attention (rows end to end, or padded), method, dropout: the adapter's, or GPT-2's own."""


PLAN = FilePlan("memory", rows=8, batch_size=1, epochs=100, seed=0)
"""A plan of a file, whose rows are given by hand."""


def step(seed: int) -> Batch:
    """Return the rows of a step."""
    source = np.random.default_rng(seed)
    rows = [Row(source.integers(3, VOCABULARY, length), np.arange(length) > 0) for length in LENGTHS]
    return Batch(rows, [RowReference("memory", place) for place in range(len(rows))], list(range(len(rows))))


def model_of(model_type: str, attention: str, method: str, dropout: float) -> nn.Module:
    """Return a model in training mode; equal for equal arguments."""
    extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "moe" in model_type else {}
    if model_type == "gpt2":
        extra = {"n_embd": 32, "n_layer": 3, "n_head": 4, "resid_pdrop": dropout, "attn_pdrop": dropout}
    model = tiny_model(model_type, attention, **extra)
    if method == "full":
        return model
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if "moe" in model_type else "all-linear"
    adapter = LoraConfig(r=2, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(model, adapter).train()  # type: ignore[arg-type]
    fuse_lora(adapted)
    return adapted


def anchor_of(config: Config) -> AnchorTerm | None:
    """Return a term of texts of 8 tokens, none of which the model is close to; None if it has no weight."""
    if not config.anchor.weight:
        return None
    texts = [Row(np.arange(8) * place + 3, np.arange(8) > 0) for place in range(1, 6)]
    ids = torch.arange(5 * 7 * 3).reshape(5, 7, 3) % VOCABULARY
    return AnchorTerm(texts, ids, torch.full((5, 7, 3), -2.0), config.anchor.weight)


def trainer_of(model: nn.Module, usage: Usage | None = PLENTY, **settings: Any) -> Trainer:
    """Return a trainer at the start of a file, with parts of at most 40 tokens."""
    config = Config.model_validate({"learning_rate": 1e-2, "micro_batch_tokens": 40, "max_length": 64, **settings})
    state = TrainState.start(model, config)
    state.cursor = Cursor(1, "memory", 0, PLAN.steps)
    execution = Execution(SingleProcess(CPU), torch.float32)
    return Trainer(state, config, execution, anchor_of(config), learned=Learned(lambda _: usage))


def steps(trainer: Trainer, count: int = 3) -> tuple[list[tuple[float, float]], str, str]:
    """Take steps; return losses and norms, and the digests of weights and moments."""
    taken = [trainer.take_step(step(seed), PLAN) for seed in range(count)]  # type: ignore[arg-type]
    digest = trainer.state.view().digest()
    return [(result.loss, result.grad_norm) for result in taken], digest.weights, digest.moments


def calls_of(trainer: Trainer) -> list[str]:
    """Return a list that gets an entry each time that the first layer's attention or MLP computes."""
    calls: list[str] = []
    for name, part in trainer.state.model.named_modules():
        if name.endswith((".0.mlp", ".0.self_attn", ".0.attn")):
            part.register_forward_pre_hook(lambda _module, _given, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("anchor", [{}, {"weight": 0.5}], ids=["alone", "anchored"])
@pytest.mark.parametrize(("model_type", "attention", "method", "dropout"), MODELS)
def test_steps_are_the_same_bit_for_bit(
    model_type: str, attention: str, method: str, dropout: float, anchor: dict[str, float]
) -> None:
    """Losses, norms, weights and moments are equal with recomputation on, off, and where memory is short."""
    outcomes: list[Any] = []
    counts: list[int] = []
    settings = ({"activation_checkpointing": "off"}, {"activation_checkpointing": "on"}, {})
    for setting, usage in zip(settings, (NOTHING, PLENTY, NOTHING), strict=True):
        model = model_of(model_type, attention, method, dropout)
        trainer = trainer_of(model, usage, method=method, anchor=anchor, batch_size=24, **setting)
        trainer.economy.recomputes(step(0))  # the proof, before anything is counted
        calls = calls_of(trainer)
        outcomes.append(steps(trainer))
        counts.append(len(calls))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert 2 * counts[0] == counts[1] <= counts[2]  # measuring computes, too


def test_layers_within_layers_are_computed_again_alike() -> None:
    """Zamba's hybrid layers hold other layers that can be recomputed: their second pass is cut in the same places."""
    outcomes: list[Any] = []
    for setting in ("off", "on"):
        model = small.small_model("zamba").train()
        outcomes.append(steps(trainer_of(model, method="full", activation_checkpointing=setting)))
    assert outcomes[0] == outcomes[1]


def test_parts_that_fit_are_computed_once() -> None:
    """`auto` keeps what it computed where a part fits, and computes again only the parts that do not."""
    trainer = trainer_of(model_of(*MODELS[0]), None)
    assert not trainer.economy.recomputes(step(0))
    trainer = trainer_of(model_of(*MODELS[0]), PLENTY)
    assert not trainer.economy.recomputes(step(0))
    long, short = [60] * 4, [9]
    profile = trainer.economy.profile
    between = (profile.estimate(long).total + profile.estimate(short).total) // 2
    trainer = trainer_of(model_of(*MODELS[0]), Usage(1 << 40, 0, int(between / 0.92)))
    row = step(0)
    assert not trainer.economy.recomputes(row.take([0]))
    rows = [Row(np.ones(60, dtype=np.int64), np.arange(60) > 0)] * 4
    assert trainer.economy.recomputes(Batch(rows, row.references, row.lines))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "olmoe"])
def test_the_rough_estimate_is_an_upper_bound(family: str) -> None:
    """Layers of any class count, and experts: where it fits, rows end to end fit, and nothing is measured."""
    model = small.small_model(family).train()
    economy = trainer_of(model, method="full", max_length=512).economy
    crude = crude_of(model)
    for lengths in ([8] * 8, [512]):
        assert economy.profile.whole(lengths) <= crude(lengths)


@pytest.mark.parametrize("lengths", [[40], [64], [65], [200], [30] * 3, [150, 150]])
@pytest.mark.parametrize(("family", "settings"), [("mamba2", {"chunk_size": 64}), ("qwen3_next", {}), ("gpt2", {})])
def test_rows_that_are_filled_up_to_blocks(family: str, settings: dict[str, Any], lengths: list[int]) -> None:
    """A scan, and linear attention in chunks, keep of each row what its blocks keep when they are full."""
    trainer = trainer_of(small.small_model(family, **settings).train(), method="full", max_length=256)
    rows = [Row(np.ones(length, dtype=np.int64), np.arange(length) > 0) for length in lengths]
    batch = Batch(rows, [RowReference("memory", place) for place in range(len(rows))], list(range(len(rows))))
    counted = kept_by_backward(trainer.state.model, lambda: trainer.accumulation.loss(batch))
    assert counted == pytest.approx(trainer.economy.profile.whole(lengths), rel=0.05)


def test_a_padded_part_is_measured_before_it_is_said_to_fit() -> None:
    """What such a model keeps does not follow from the shapes of its weights, from which others are told to fit."""
    model = small.small_model("mamba2", chunk_size=64).train()
    need = trainer_of(model, method="full").economy.profile.estimate([31] * 4).total
    enough, short = (Usage(1 << 40, int(share * need / 0.92), 0) for share in (1.01, 0.99))
    assert crude_of(model)([31] * 4) < 0.75 * short.free
    assert [False, True] == [
        trainer_of(model, usage, method="full").economy.recomputes(step(0)) for usage in (enough, short)
    ]


def test_the_largest_layer_is_the_one_that_is_recomputed() -> None:
    """Layers may differ in kind and in size; experts of a layer are no layers."""
    model: Any = model_of(*MODELS[1])
    assert 2 == round(trainer_of(model, method="full").economy.profile.layers)
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(32, 4096), nn.GELU(), nn.Linear(4096, 32))
    model.model.layers[0].mlp.unused = nn.ModuleList([nn.Linear(1, 1)] * 9)
    assert 1.0 < trainer_of(model, method="full").economy.profile.layers < 1.5


def test_a_step_that_lacks_memory_is_taken_again_with_less() -> None:
    """Memory that runs out in a part makes `auto` compute layers again from then on; the state is the same to a bit."""
    expected = steps(trainer_of(model_of(*MODELS[0])))
    trainer = trainer_of(model_of(*MODELS[0]))
    calls: list[int] = []

    def fail(_module: nn.Module, _given: Any) -> None:
        calls.append(trainer.state.step)
        if calls == [0, 0, 1, 1]:  # in the second part of the second step
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.state.model.get_submodule("base_model.model.model.layers.1.mlp").register_forward_pre_hook(fail)
    actual = steps(trainer)
    assert trainer.economy.always
    assert expected == actual


@pytest.mark.parametrize("times", [1, 2, 3])
def test_anchor_texts_that_lack_memory_are_taken_again_with_less(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings go first, then layers are computed again, to the same bits; in the end, no row is blamed."""
    settings: dict[str, Any] = {"anchor": {"weight": 0.5}}
    expected = steps(trainer_of(model_of(*MODELS[0]), **settings))
    trainer = trainer_of(model_of(*MODELS[0]), **settings)
    given_up, left, plain = [True, False], [times], AnchorTerm.add_gradients

    def fail(*arguments: Any, **options: Any) -> torch.Tensor:
        found = plain(*arguments, **options)  # gradients are added already
        if trainer.state.step == 1 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(AnchorTerm, "add_gradients", fail)
    monkeypatch.setattr(trainer.economy, "record_nothing", lambda: bool(given_up) and given_up.pop(0))
    if times == 3:
        with pytest.raises(OnwardError, match="ran out while the anchor's part of a step was computed: CUDA"):
            steps(trainer)
        assert not any(parameter.grad is not None for parameter in trainer.state.parameters.values())
    else:
        assert expected == steps(trainer)
        assert (times == 2) == trainer.economy.always


def test_off_means_off() -> None:
    """With `off`, lack of memory is raised as it is: the caller splits the file's steps into smaller parts."""
    trainer = trainer_of(model_of(*MODELS[0]), NOTHING, activation_checkpointing="off")
    assert not trainer.economy.recomputes(step(0))
    assert not trainer.economy.may_recompute()


class Forgetful(nn.Module):
    """A layer that computes something else each time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.times = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return self.inner(x) * (1.0 + self.times / 8)


def test_a_model_that_cannot_be_computed_again_is_refused() -> None:
    """What a second pass would compute otherwise is proven on the model: `on` is refused, `auto` keeps everything."""
    model: Any = model_of(*MODELS[1])
    layer = model.model.layers[0]
    layer.mlp = Forgetful(layer.mlp)
    with pytest.raises(ConfigError, match="the same bits recomputed"):
        trainer_of(model, activation_checkpointing="on", method="full").economy.recomputes(step(0))
    assert not trainer_of(model, NOTHING, method="full").economy.recomputes(step(0))


def test_the_switch_can_be_written_as_yaml_reads_it() -> None:
    """`on` and `off` without quotes are true and false to YAML, and mean what they say."""
    assert ["on", "off", "auto"] == [
        parse_config({"activation_checkpointing": value}).activation_checkpointing for value in (True, False, "auto")
    ]


def test_a_profile_survives_the_ledger() -> None:
    """What was measured is kept as JSON values and read back; longer rows take more, recomputation takes less."""
    profile = trainer_of(model_of("gpt2", "eager", "full", 0.1), method="full").economy.profile
    assert profile == Profile.of(profile.to_dict())
    assert profile.whole.pair > 0  # plain attention keeps its scores
    sizes = [profile.estimate([length] * 2).total for length in (8, 16, 32)]
    assert sizes == sorted(set(sizes))
    assert profile.recomputed is not None
    assert profile.recomputed([60]) < profile.whole([60])
    assert profile.estimate([60], recompute=True).total <= profile.estimate([60]).total


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_copy_for_a_commit_is_counted_where_it_lies(method: str) -> None:
    """It stays in main memory from one commit to the next: on a CPU beside the step, on a GPU not."""
    trainer = trainer_of(model_of("llama", ROW_ATTENTION, method, 0.0), method=method)
    trainer.take_step(step(0), PLAN)
    copied = trainer.state.snapshot().copied
    assert copied is not None
    profile = trainer.economy.profile
    large = [tensor for tensor in copied.tensors if tensor.dim()]  # not Adam's counters
    assert profile.copied == sum(tensor.numel() * tensor.element_size() for tensor in large)
    on_cpu, on_gpu = (replace(profile, device=device).estimate([8]) for device in ("cpu", "cuda"))
    assert (profile.copied, 0) == (on_cpu.commit, on_gpu.commit)
