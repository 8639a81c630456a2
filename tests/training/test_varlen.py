"""Attention over all rows in one call, held against row by row with a plain kernel of the same signature."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from one_call import attended
from peft import LoraConfig, get_peft_model
from rows import CPU, WINDOWED, batch, tiny_model
from torch import nn

from onward.training.layers.attention import PADDING_FREE, ROW_ATTENTION
from onward.training.layers.fused_lora import fuse_lora
from onward.training.layers.varlen import VARLEN, RowKernel, Varlen, kernel_for, kernel_name
from onward.training.steps.loss import TargetLoss

LENGTHS = (9, 2, 17, 6)


def newest(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attend as `varlen_attn` of PyTorch 2.11 and later says it does: softmax over whole matrices, with a mask."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert torch.int32 == cu_seq_q.dtype
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert query.shape[1] == key.shape[1] or enable_gqa
    return attended((query, key, value), cu_seq_q, scale, window_size)


def without_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend as an earlier release does: causal or not, heads of one number."""
    window = (-1, 0) if is_causal else (-1, -1)
    return newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window)


def found(kernel: Any) -> Varlen:
    """Return what is found of a kernel."""
    one = Varlen.of(kernel)
    assert one is not None
    return one


def gradients(model: nn.Module, kernel: Varlen | None, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return loss and gradients of the same rows."""
    loss = TargetLoss(model, CPU, dtype, kernel=kernel)(batch(*LENGTHS))
    loss.backward()
    taken = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **taken}


@pytest.mark.parametrize("kernel", [newest, without_window])
@pytest.mark.parametrize("model_type", sorted(PADDING_FREE))
def test_one_call_is_row_by_row(model_type: str, kernel: Any) -> None:
    """Loss and gradients are those of row by row: causal, with a sliding window, with grouped heads."""
    model = tiny_model(model_type, ROW_ATTENTION, **({"sliding_window": 5} if model_type in WINDOWED else {}))
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return kernel(*args, **kwargs)

    expected = gradients(model, None)
    actual = gradients(model, Varlen(counted, found(kernel).takes))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    window = model_type in WINDOWED and kernel is without_window  # such a kernel is not asked
    assert ([] if window else [sum(LENGTHS)] * 2) == calls


def test_a_window_sees_itself_and_those_before() -> None:
    """A window of 3 tokens is a left border of 2, as transformers and FlashAttention count."""
    asked: list[dict[str, Any]] = []

    def kernel(*args: Any, scale: float, window_size: tuple[int, int]) -> torch.Tensor:
        asked.append({"scale": scale, "window_size": window_size, "shape": tuple(args[1].shape)})
        return args[0]

    query, key = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    rows = RowKernel.of(found(kernel), (2, 3), CPU)
    assert (1, 5, 4, 8) == tuple(rows.attend((query, key, key), 3, None).shape)
    rows.attend((query, query, query), None, 0.5)
    assert [0, 2, 5] == rows.places.tolist()
    assert [
        {"scale": 8**-0.5, "window_size": (2, 0), "shape": (5, 4, 8)},  # heads repeated: it takes no groups
        {"scale": 0.5, "window_size": (-1, 0), "shape": (5, 4, 8)},
    ] == asked


@pytest.mark.parametrize(
    ("sizes", "window", "fits"),
    [((8, 8, 8), None, True), ((8, 8, 8), 4, False), ((8, 8, 16), None, False), ((12, 12, 12), None, False),
     ((512, 512, 512), None, False), ((256, 256, 256), None, True)],
)  # fmt: skip
def test_what_the_kernel_cannot_do_is_not_asked(sizes: tuple[int, int, int], window: int | None, fits: bool) -> None:
    """Heads of other sizes, and a window that a release lacks, go row by row."""
    parts = [torch.zeros(1, 2, 3, size) for size in sizes]
    assert fits == found(without_window).fits(*parts, window)


def test_types_are_those_of_autocast() -> None:
    """Under autocast the kernel gets bfloat16, whatever norms and rotations left: PyTorch does not cast for it."""
    types: list[torch.dtype] = []

    def kernel(query: torch.Tensor, *_args: Any, scale: float, is_causal: bool) -> torch.Tensor:
        types.append(query.dtype)
        assert is_causal
        return query * scale

    rows, parts = RowKernel.of(found(kernel), (3,), CPU), torch.zeros(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rows.attend((parts, parts, parts), None, None)
    rows.attend((parts, parts, parts), None, None)
    assert [torch.bfloat16, torch.float32] == types


def test_the_kernel_of_this_release_is_found() -> None:
    """The installed PyTorch has a kernel whose signature is understood; a CPU does not run it."""
    from torch.nn.attention.varlen import varlen_attn

    assert VARLEN is not None
    assert set(inspect.signature(varlen_attn).parameters) == VARLEN.takes
    assert kernel_for(CPU, torch.bfloat16) is None
    assert "" == kernel_name(CPU, torch.bfloat16)
    assert Varlen.of(None) is None
    assert Varlen.of(lambda query, key: query) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_call_the_kernel_with_the_same_rows(dtype: torch.dtype) -> None:
    """With layers computed again in the backward pass, and LoRA layers in one node, loss and gradients are equal."""
    outcomes: list[dict[str, torch.Tensor]] = []
    for recomputes in (False, True):
        torch.manual_seed(1)
        adapter = LoraConfig(r=2, lora_dropout=0.25, target_modules="all-linear", init_lora_weights=False)
        model: Any = get_peft_model(tiny_model("qwen3", ROW_ATTENTION), adapter).train()  # type: ignore[arg-type]
        fuse_lora(model)
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        outcomes.append(gradients(model, found(newest), dtype))
    expected, actual = outcomes
    assert expected.keys() == actual.keys()
    assert [] == [name for name, value in expected.items() if not torch.equal(value, actual[name])]
