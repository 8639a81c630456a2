"""Memory for time: layers computed again, only where a part would not fit, with the same bits always."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small
import torch
from late_copies import Late
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
from onward.training.layers.cross_entropy import CHUNK_BYTES, LOGITS_BYTES, TILE_BYTES
from onward.training.layers.fused_lora import fuse_lora
from onward.training.state import Cursor, TrainState
from onward.training.steps.anchor import AnchorTerm
from onward.training.steps.economy import Learned
from onward.training.steps.memory import Polynomial, Profile, largest_part, largest_texts, most_of, part_tokens
from onward.training.steps.model_memory import crude_of, kept_by_backward, pinned
from onward.training.trainer import Trainer
from onward.training.transfer import Overlapped
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


def test_gradients_that_are_added_apart_count_twice() -> None:
    """Those of a share that has several parts are added before they are added to those of the other shares."""
    profile = Profile(0, 50_000, 0, Polynomial(0.0, 100.0, 0.0), None, 10, 1, 0, "cuda")
    settings = ({}, {"parts": 2}, {"gradient_accumulation": 4}, {"parts": 2, "gradient_accumulation": 4})
    found = [most_of(profile, Config.model_validate(each)).gradients for each in settings]
    assert [50_000, 50_000, 50_000, 100_000] == found


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


def test_gradients_take_the_place_of_activations() -> None:
    """On a CPU a step of one part has either all activations or all gradients; further parts begin with gradients."""
    linear = Polynomial(0.0, 100.0, 0.0)
    profile = Profile(0, 50_000, 0, linear, None, 10, 1, 0, "cpu", "full")
    few, many = profile.estimate([100], alone=True), profile.estimate([1000], alone=True)
    assert (50_000, 0) == (few.gradients + few.activations + few.logits, many.gradients)
    assert 50_000 == profile.estimate([1000]).gradients
    on_gpu = replace(profile, device="cuda")
    assert on_gpu.estimate([1000], alone=True) == on_gpu.estimate([1000])


@pytest.mark.parametrize(("device", "chunk"), [("cpu", LOGITS_BYTES), ("cuda", CHUNK_BYTES["cuda"])])
def test_logits_of_a_trained_head_are_those_of_a_chunk_on_its_device(device: str, chunk: int) -> None:
    """A GPU computes more tokens at a time; neither keeps more logits than the part has."""
    profile = Profile(0, 9_000, 0, Polynomial(0, 1, 0), None, 10, 100_000, 3_000, device, "full")
    assert [2 * 4 * 8 * 100_000 + 9_000, 2 * chunk + 9_000] == [
        profile.estimate([length]).logits for length in (8, 10_000)
    ]


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


def test_a_copy_from_a_gpu_takes_what_pytorch_rounds_it_up_to() -> None:
    """Each storage of pinned memory has a power of two bytes; the copy has one for each large weight, and two more."""
    shapes = [(3000, 700), (50, 60), (1100, 1000), (70,)]
    weights, moments = ([torch.zeros(*shape) for _ in range(copies) for shape in shapes] for copies in (1, 2))
    memory = Overlapped(Late(), pins=False).copy(weights, moments).memory
    assert memory is not None
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in memory.tensors}
    sizes = [weight.nbytes for weight in weights]
    taken = pinned(sizes, 2 * sum(sizes))
    assert sum(1 << (size - 1).bit_length() for size in storages.values()) == taken
    assert taken > 1.2 * 3 * sum(sizes)
    assert 0 == pinned([], 0)


def test_the_tokens_of_a_part_follow_from_memory() -> None:
    """The most that fit without recomputation, else with it up to the usual number, never fewer than the least."""
    one = Polynomial(0.0, 1000.0, 0.0)
    few = Polynomial(0.0, 100.0, 0.0)
    profile = Profile(10_000, 10, 20, one, few, 10, 1, 0, "cuda")
    rooms = (40_000_000, 37_000_000, 10_000_000, 1_900_000, 700_000, 10)
    assert [32768, 32768, 8192, 4096, 2048, 2048] == [part_tokens(profile, room, 1024) for room in rooms]


def test_the_largest_part_of_a_step() -> None:
    """It follows from the tokens of a part, from the rows of a step, or from the parts that the config asks for."""
    assert [1024] * 8 == largest_part(Config())
    assert [1024] * 4 == largest_part(Config.model_validate({"micro_batch_tokens": 4500}))
    assert [2048] == largest_part(Config.model_validate({"micro_batch_tokens": 100, "max_length": 2048}))
    assert [1024] * 3 == largest_part(Config.model_validate({"gradient_accumulation": 3}))


def test_the_texts_of_the_anchor_count_where_they_are_larger() -> None:
    """One for eight rows of a step, as many at once as a part has tokens, their logits for some tokens at a time."""
    profile = Profile(0, 0, 0, Polynomial(0.0, 1000.0, 0.0), None, 10, 1 << 18, 0, "cpu")
    counts: list[int] = []
    for settings in ({}, {"weight": 0.0}, {"rows": 0}, {"tokens": 200}, {"tokens": 5000}):
        anchor = {"weight": 0.5, "tokens": 1500, **settings}
        config = Config.model_validate({"batch_size": 72, "max_length": 10, "anchor": anchor})
        texts = largest_texts(config)
        assert texts == [config.anchor.tokens] * len(texts)
        counts.append(len(texts))
        logits = 4 * LOGITS_BYTES if texts else 2 * TILE_BYTES["cpu"]
        assert logits == most_of(profile, config).logits
    assert [5, 0, 0, 9, 1] == counts
    few = Config.model_validate({"batch_size": 8, "max_length": 1024, "anchor": {"weight": 0.5, "tokens": 8}})
    assert profile.estimate([1024] * 8, alone=True) == most_of(profile, few)
