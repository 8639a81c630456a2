"""Measuring the probe changes nothing of the model that is trained, also where evaluation is not only reading."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MethodType
from typing import Any

import pytest
import small
import torch
from peft import LoraConfig, get_peft_model
from rows import CPU, VOCABULARY, batch, tiny_model
from torch import nn
from transformers.models.rwkv.modeling_rwkv import RwkvModel

from onward.config import Config
from onward.errors import ModelError
from onward.training.boundary import Boundary, run_hooks
from onward.training.layers.twin import keeps_process_state, named_types, with_weights, writers_in_evaluation
from onward.training.measuring.probe import Probe
from onward.training.state import TrainState, digest_tensors
from onward.training.steps.loss import TargetLoss

ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0, "long_factor": [4.0] * 4,
        "short_factor": [1.5] * 4, "original_max_position_embeddings": 8,
    },
}  # fmt: skip
"""Kinds of RoPE that write their buffers; the probe's rows are longer than the original length."""


def make_model(kind: str) -> nn.Module:
    """Return a model of a kind, which a forward pass in evaluation would change."""
    if kind == "rwkv":  # divides weights, one power of two for each second layer
        return tiny_model("rwkv", "eager", rescale_every=1, attention_hidden_size=32, context_length=64)
    if kind == "rwkv with an adapter":
        adapter = LoraConfig(r=2, target_modules=["key"], init_lora_weights=False)
        base: Any = make_model("rwkv")
        return get_peft_model(base, adapter).train()
    if kind == "parameters":  # PyTorch's cache of parametrized weights is one for the process
        adapter = LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"], init_lora_weights=False
        )
        base = tiny_model("qwen2_moe", "sdpa", num_experts=4, moe_intermediate_size=16)
        return get_peft_model(base, adapter).train()
    model = tiny_model("llama", "sdpa", rope_parameters=ROPE[kind])
    if kind == "dynamic":  # what is longer than the probe's rows was never seen
        model.model.rotary_emb.original_max_seq_len = model.model.rotary_emb.max_seq_len_cached = 8  # type: ignore
        model.config.max_position_embeddings = 8  # type: ignore[union-attr]
    return model


def digest(model: nn.Module) -> str:
    """Return the digest of all weights and buffers."""
    return digest_tensors([*model.named_parameters(), *model.named_buffers()])


KINDS = ("rwkv", "rwkv with an adapter", "parameters", *ROPE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_changes_no_bit(kind: str) -> None:
    """Weights, buffers and the values next to them stay as they are, and so do gradients that follow."""
    measured, plain = make_model(kind), make_model(kind)
    before, beside = digest(measured), small.beside_weights(measured)
    probe = Probe(measured, 0, CPU, torch.float32)
    state = TrainState.start(measured, Config.model_validate({"method": "full"}))
    with ThreadPoolExecutor(1) as other:
        losses = {probe.of_model(), probe.of_model(), other.submit(probe.of_copy(state.snapshot())).result()}
    assert 1 == len(losses)
    assert before == digest(measured)
    assert [] == small.changed_beside_weights(measured, beside)
    for model in (measured, plain):
        TargetLoss(model, CPU, torch.float32)(batch(6, 5)).backward()
    for name, weight in measured.named_parameters():
        other_weight = plain.get_parameter(name)
        assert (weight.grad is None) == (other_weight.grad is None)
        assert weight.grad is None or torch.equal(weight.grad, other_weight.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["rwkv with an adapter", "parameters", "longrope"])
def test_measuring_does_not_disturb_the_steps_beside_it(kind: str) -> None:
    """Steps that are taken while copies are measured in another thread have the bits of steps that are not."""
    digests = set()
    for measures in (False, True):
        model = make_model(kind)
        config = Config.model_validate({"method": "full", "learning_rate": 0.01})
        state, loss = TrainState.start(model, config), TargetLoss(model, CPU, torch.float32)
        probe = Probe(model, 0, CPU, torch.float32)
        with ThreadPoolExecutor(1) as other:
            for step in range(3):
                waiting = other.submit(probe.of_copy(state.snapshot())) if measures else None
                loss(batch(6, 5, seed=step)).backward()
                loss.forget()
                state.optimizer.step()
                state.optimizer.zero_grad()
                if waiting is not None:
                    assert waiting.result().loss > 0
        digests.add(digest(model))
    assert 1 == len(digests)


def test_who_writes_is_found_before_it_writes() -> None:
    """The module that would write is named; a model that only reads has none, and none of it changed."""
    model = make_model("rwkv")
    before = digest(model)
    assert frozenset({RwkvModel}) == writers_in_evaluation(model, run)
    assert before == digest(model)
    assert frozenset() == writers_in_evaluation(tiny_model("llama", "sdpa"), run)


def run(model: nn.Module) -> None:
    """Run a forward pass."""
    model(input_ids=torch.tensor([[3, 4, 5]]) % VOCABULARY)


def test_what_always_writes_is_refused() -> None:
    """A model that writes to a weight in training mode too is refused by the weight's name, unchanged."""
    model = tiny_model("llama", "sdpa")

    def write(module: Any, _inputs: Any) -> None:
        module.weight.add_(1.0)

    model.get_submodule("model.norm").register_forward_pre_hook(write)
    before = digest(model)
    with pytest.raises(ModelError, match=r"changes the weight model\.norm\.weight"):
        Probe(model, 0, CPU, torch.float32)
    assert before == digest(model)


def test_who_writes_is_known_by_name_from_then_on() -> None:
    """With the names that were found once the probe measures the same, and looks for nothing again."""
    model = make_model("rwkv")
    found = Probe(model, 0, CPU, torch.float32)
    told = Probe(make_model("rwkv"), 0, CPU, torch.float32, writers=named_types(found.writers))
    assert ("transformers.models.rwkv.modeling_rwkv.RwkvModel",) == named_types(found.writers)
    assert found.writers == told.writers
    assert found.of_model() == told.of_model()


def test_a_write_that_no_admission_foresaw_is_refused() -> None:
    """A model that writes to a weight although none of its modules is known to is refused when it is measured."""
    model = make_model("rwkv")
    with pytest.raises(ModelError, match="changes the weight"):
        Probe(model, 0, CPU, torch.float32, writers=()).of_model()


def test_a_hook_on_the_twin_is_not_the_models() -> None:
    """What is hung on a twin's modules does not run in the model's forward pass."""
    model = tiny_model("llama", "sdpa")
    calls: list[nn.Module] = []
    twin = with_weights(model, {})
    twin.get_submodule("lm_head").register_forward_hook(lambda module, _i, _o: calls.append(module))
    run(model)
    assert [] == calls
    run(twin)
    assert [twin.get_submodule("lm_head")] == calls


def test_state_of_the_process_is_known() -> None:
    """Adapters of parameters use a cache of the whole process; those of layers do not."""
    assert keeps_process_state(make_model("parameters"))
    assert not keeps_process_state(make_model("rwkv with an adapter"))


def test_hooks_leave_nothing_in_buffers() -> None:
    """What a hook's forward passes at a boundary leave in buffers is put back."""
    model: Any = make_model("longrope")
    before = small.beside_weights(model)
    boundary = Boundary(0, "a.jsonl", model, None, None, Config())  # type: ignore[arg-type]

    def hook(_boundary: Boundary) -> dict[str, Any]:
        model(input_ids=torch.arange(20)[None])
        return {"changed": small.changed_beside_weights(model, before)}

    assert {"changed": ["LlamaRotaryEmbedding.inv_freq", "LlamaRotaryEmbedding.long_inv_freq"]} == run_hooks(
        [hook], boundary, CPU
    )
    assert [] == small.changed_beside_weights(model, before)


def test_a_hook_on_the_model_is_not_the_twins() -> None:
    """The hooks of FSDP2 on a model, which reshard its weights for a state dict, are not called for the twin's."""
    model = tiny_model("llama", "sdpa")
    calls: list[nn.Module] = []
    twin = with_weights(model, {})
    model.register_state_dict_pre_hook(lambda module, _prefix, _keep: calls.append(module))
    model.register_full_backward_pre_hook(lambda module, _gradient: calls.append(module))
    twin.state_dict()
    run(twin)
    assert [] == calls
    model.state_dict()
    assert [model] == calls


@pytest.mark.parametrize("bind", [MethodType, partial], ids=["a method", "a part of a call"])
def test_what_was_given_to_a_module_itself_is_the_twins_own(bind: Callable[..., Any]) -> None:
    """A forward pass that was put on one module computes with the twin's weights, and in its mode."""

    def doubled(module: Any, x: torch.Tensor) -> torch.Tensor:
        return x * module.weight * (1.0 if module.training else 2.0)

    model: Any = nn.Sequential(nn.RMSNorm(3))
    model[0].forward = bind(doubled, model[0])
    model.train()
    twin = with_weights(model, {"0.weight": torch.full((3,), 5.0)})
    assert [10.0] * 3 == twin(torch.ones(3)).tolist()
    assert [1.0] * 3 == model(torch.ones(3)).tolist()
