"""What only CUDA computes: attention over rows laid end to end, products into float32, and kernels without an order."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import emulated_device as device
import torch

LIBRARY = torch.library.Library("aten", "IMPL")


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the host that has the memory of one of the device, and nothing of its graph."""
    storage = tensor.detach().untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    memory.storage = storage  # type: ignore[attr-defined]  # kept as long as the memory is used
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(bytes_, tensor.storage_offset(), tensor.shape, tensor.stride())


def done(work: Callable[[], None]) -> None:
    """Do something on the host, and again at each replay if it is being recorded."""

    def quietly() -> None:
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            work()

    quietly()
    device.also_recorded(quietly)


class Rows:
    """Attention of rows that lie end to end, shape (tokens, heads, dim), in float32.

    Args:
        places: the first token of each row, and the number of all tokens.
        left, right: how many tokens before and after itself a token sees; negative for all.
    """

    def __init__(self, places: torch.Tensor, scale: float | None, left: int, right: int) -> None:
        self.places, self.scale, self.left, self.right = places.tolist(), scale, left, right

    def __iter__(self) -> Iterator[slice]:
        return (slice(*ends) for ends in zip(self.places, self.places[1:], strict=False) if ends[0] < ends[1])

    def weights(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of one row and the logarithm of what they were divided by."""
        scores = query @ key.transpose(1, 2) * self.factor(query)
        token = torch.arange(query.shape[1])
        ahead = token[None] - token[:, None]
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if self.right >= 0:
            hidden |= ahead > self.right
        if self.left >= 0:
            hidden |= -ahead > self.left
        scores = scores.masked_fill(hidden, float("-inf"))
        return torch.softmax(scores, -1), torch.logsumexp(scores, -1)

    def factor(self, query: torch.Tensor) -> float:
        """Return what scores are multiplied by."""
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.transpose(0, 1).float().repeat_interleave(heads // tensor.shape[1], 0)


def _window(is_causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, 0 if is_causal else -1 if right is None else right


def attention(
    query: Any, key: Any, value: Any, places: Any, _places: Any, _most: Any, _most_keys: Any, dropout: float,
    is_causal: bool, _debug: bool, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, **_: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """`aten::_flash_attention_forward`."""
    assert dropout == 0
    out = torch.empty_like(query)
    sums = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
    q, k, v, ends, o, s = map(on_host, (query, key, value, places, out, sums))

    def work() -> None:
        rows = Rows(ends, scale, *_window(is_causal, window_size_left, window_size_right))
        for row in rows:
            parts = [_by_head(each[row], q.shape[1]) for each in (q, k, v)]
            weights, s[:, row] = rows.weights(*parts[:2])
            o[row] = (weights @ parts[2]).transpose(0, 1).to(o.dtype)

    done(work)
    nothing = torch.zeros(2, dtype=torch.int64, device=query.device)
    return out, sums, nothing, nothing[:1].clone(), torch.empty(0, device=query.device, dtype=query.dtype)


def attention_gradients(
    grad: Any, query: Any, key: Any, value: Any, _out: Any, _sums: Any, places: Any, _places: Any, _most: Any,
    _most_keys: Any, _dropout: float, is_causal: bool, _state: Any, _unused: Any, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """`aten::_flash_attention_backward`."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    q, k, v, g, ends = map(on_host, (query, key, value, grad, places))
    found = [on_host(each) for each in grads]

    def work() -> None:
        rows = Rows(ends, scale, *_window(is_causal, window_size_left, window_size_right))
        for row in rows:
            query, key, value, grad = (_by_head(each[row], q.shape[1]) for each in (q, k, v, g))
            weights, _ = rows.weights(query, key)
            by_weight = grad @ value.transpose(1, 2)
            by_score = weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True)) * rows.factor(query)
            parts = (by_score @ key, by_score.transpose(1, 2) @ query, weights.transpose(1, 2) @ grad)
            for target, part in zip(found, parts, strict=True):
                heads = part.unflatten(0, (target.shape[1], -1)).sum(1)  # several heads of queries share one of keys
                target[row] = heads.transpose(0, 1).to(target.dtype)

    done(work)
    return grads


def masked_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`aten::scaled_dot_product_attention`, as PyTorch computes it without a kernel of its own."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def product(left: Any, right: Any, out_dtype: torch.dtype) -> torch.Tensor:
    """`aten::mm.dtype`."""
    return left.to(out_dtype) @ right.to(out_dtype)


def added_product(
    total: Any, left: Any, right: Any, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Any
) -> torch.Tensor:
    """`aten::addmm.dtype_out`."""
    return out.copy_(torch.addmm(total.to(out_dtype), left.to(out_dtype), right.to(out_dtype), beta=beta, alpha=alpha))


def histogram(values: Any, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """`aten::histc`, which adds in any order on CUDA."""
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("_histc_cuda does not have a deterministic implementation")
    out = torch.empty(bins, dtype=values.dtype, device=values.device)
    given, found = on_host(values), on_host(out)
    done(lambda: found.copy_(torch.histc(given.float(), bins, min, max)))
    return out


def register() -> None:
    """Let the device compute these."""
    LIBRARY.impl("_flash_attention_forward", attention, "CUDA")
    LIBRARY.impl("_flash_attention_backward", attention_gradients, "CUDA")
    LIBRARY.impl("mm.dtype", product, "CUDA")
    LIBRARY.impl("addmm.dtype_out", added_product, "CUDA")
    LIBRARY.impl("histc", histogram, "CUDA")
    for key in ("AutogradCUDA", "CUDA"):
        LIBRARY.impl("scaled_dot_product_attention", masked_attention, key)
