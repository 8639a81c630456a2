"""Norms, gates and rotations in one node each: what transformers computes, and only where that is understood."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from onward.training.layers import decoder_parts
from onward.training.layers.decoder_nodes import rotated
from onward.training.layers.decoder_parts import form_of, fuse_parts, is_gated, kernels_work, rotating

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FUSED = {
    "llama": {"norm": 5, "gated": 2, "rotates": 2},
    "mistral": {"norm": 5, "gated": 2, "rotates": 2},
    "qwen2": {"norm": 5, "gated": 2, "rotates": 2},
    "qwen3": {"norm": 9, "gated": 2, "rotates": 2},
    "olmo2": {"norm": 9, "gated": 2},
    "gemma": {"norm": 5, "rotates": 2},
    "gemma2": {"norm": 9, "rotates": 2},
    "phi3": {"norm": 5, "rotates": 2},
    "gpt_neox": {"rotates": 2},
    "cohere": {"gated": 2},
}
"""What is fused of each family with two layers: gates other than SiLU are not, nor rotations of pairs, nor those that
are rounded otherwise. GPT-NeoX and Phi-3 may rotate a part of each head: then their own function is called."""


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random tiny model in training mode, with norms that are not ones."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=dtype).train()
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.uniform_(0.5, 1.5)
    return model


def fused_in(model: nn.Module) -> dict[str, int]:
    """Count the modules that have a forward pass of their own, by what it does."""
    names = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    kinds = {"normed": "norm", "gated": "gated"}
    return dict(Counter(kinds.get(getattr(getattr(each, "func", None), "__name__", ""), "rotates") for each in names))


def outcome(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits and gradients of two short rows."""
    ids = torch.arange(2 * 9).reshape(1, 18) % 90 + 3
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits.detach(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FUSED)
def test_a_fused_model_computes_what_transformers_computes(family: str, dtype: torch.dtype) -> None:
    """Logits to the last bit, gradients to rounding, in float32 and under autocast; known parts, and no others."""
    plain = model_of(family)
    fused = copy.deepcopy(plain)
    fuse_parts(fused)
    assert FUSED[family] == fused_in(fused)
    (logits, grads), (fused_logits, fused_grads) = (outcome(model, dtype) for model in (plain, fused))
    assert torch.equal(logits, fused_logits)
    assert grads.keys() == fused_grads.keys()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for name, grad in grads.items():
        assert float((fused_grads[name] - grad).norm()) <= limit * float(grad.norm()) + 1e-9, name


def test_only_the_model_at_hand_is_changed() -> None:
    """Another model of the same family, and a copy that is made later, compute by themselves."""
    model = model_of("qwen3")
    fuse_parts(model)
    other = model_of("qwen3")
    assert {} == fused_in(other)
    copied = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm) or hasattr(module, "variance_epsilon"):
            module.weight.data.zero_()
    assert torch.equal(outcome(copied, torch.float32)[0], outcome(other, torch.float32)[0])


@pytest.mark.parametrize("wrong", ["another constant", "another order", "a bias", "a buffer"])
def test_a_norm_that_computes_something_else_stays(wrong: str) -> None:
    """Whatever its name and its weights are: it is recognized by what it computes."""

    class Norm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """Compute nearly the same."""
            x = hidden_states.float()
            if wrong == "another order":
                return (self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()).to(
                    hidden_states.dtype
                )
            y = super().forward(hidden_states)
            return y * 1.001 if wrong == "another constant" else y

    norm: Any = Norm(16, eps=1e-6)
    if wrong == "a bias":
        norm.bias = nn.Parameter(torch.zeros(16))
    if wrong == "a buffer":
        norm.register_buffer("seen", torch.zeros(1))
    fuse_parts(norm)
    assert "forward" not in vars(norm)
    assert form_of(LlamaRMSNorm(16, eps=1e-6), 1e-6) is not None


def test_a_gate_with_another_activation_or_an_addition_stays() -> None:
    """Only `down(silu(gate) * up)` is computed in one node."""
    made = AutoConfig.for_model("llama", **SIZES)
    plain: Any = LlamaMLP(made)
    assert is_gated(plain)
    plain.act_fn = ACT2FN["gelu"]
    assert not is_gated(plain)

    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Add the input."""
            return super().forward(x) + x

    assert not is_gated(Doubled(made))


@pytest.mark.parametrize("keeps", [True, False])
def test_an_attention_with_a_decorator_keeps_it(keeps: bool) -> None:
    """What decorates the forward pass goes on to; if it does not show what it calls, the attention stays as it is."""
    calls: list[int] = []

    def counted(forward: Any) -> Any:
        hidden = {"forward": forward}

        @functools.wraps(forward)
        def shows(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return forward(*args, **kwargs)

        @functools.wraps(forward)
        def hides(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return hidden["forward"](*args, **kwargs)

        return shows if keeps else hides

    plain = model_of("llama")
    kind: Any = type(plain.model.layers[0].self_attn)
    decorated = type("Decorated", (kind,), {"forward": counted(counted(kind.forward))})
    for layer in plain.model.layers:
        layer.self_attn.__class__ = decorated
    fused = copy.deepcopy(plain)
    fuse_parts(fused)
    assert FUSED["llama"]["rotates"] * keeps == fused_in(fused).get("rotates", 0)
    (logits, _), (fused_logits, _) = (outcome(model, torch.float32) for model in (plain, fused))
    assert torch.equal(logits, fused_logits)
    assert 2 * 2 * len(plain.model.layers) == len(calls)


def test_an_attention_without_a_known_rotation_stays() -> None:
    """One that names no such function, or another one under this name."""
    families = {"llama": True, "cohere": False, "olmo2": False, "glm": False}
    for family, known in families.items():
        kinds = {type(part) for part in model_of(family).modules() if type(part).__name__.endswith("Attention")}
        assert {known} == {rotating(kind) is not None for kind in kinds}, family


def test_a_processor_has_no_kernels() -> None:
    """On a CPU a step computes what it always did."""
    assert not kernels_work(torch.device("cpu"))


@pytest.mark.parametrize(("error", "is_raised"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, False)])
def test_kernels_that_find_no_room_are_not_replaced(
    error: int, is_raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other kernels would compute other bits until a disk has room again; where nothing can ever be written, they are
    used instead.
    """

    def fail(*_: object) -> None:
        raise OSError(error, "no")

    monkeypatch.setattr(decoder_parts, "kernels_of", lambda: SimpleNamespace(gate=fail))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    works: Any = vars(decoder_parts)["_try"].__wrapped__
    with pytest.raises(OSError, match="no") if is_raised else contextlib.nullcontext():
        assert not works(torch.device("cpu"))


def test_a_rotation_that_is_called_in_another_way_stays_as_it_is() -> None:
    """With other arguments, as in models that rotate one tensor at a time, the function itself is called."""
    assert (1, 2) == rotated(lambda one, *, cos: (one, cos), 1, cos=2)
    assert (1, 2, 3) == rotated(lambda *given: given, 1, 2, 3)
