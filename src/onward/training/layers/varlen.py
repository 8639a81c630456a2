"""PyTorch's attention over rows laid end to end, in one call: `torch.nn.attention.varlen.varlen_attn`.

Its signature differs from release to release (a window, a scale and grouped heads came later), so it is inspected, not
guessed from the version. What a release cannot express is computed row by row (`attention.py`). The kernel is a
parameter, so that a CPU can compare everything but the kernel itself with a plain reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar

import torch

from onward.training.device.environment import HALF
from onward.training.device.errors import is_of_the_device

WIDEST, MULTIPLE = 256, 8
"""The largest head size for FlashAttention, and what the size must be a multiple of."""
GROUPED = "enable_gqa"
"""The parameter that lets several heads of queries share one of keys and values."""
FIRST_CAPABILITY = (8, 0)
"""The compute capability from which it runs."""


@dataclass(frozen=True)
class Varlen:
    """A kernel of one call, with the parameters it takes.

    Args:
        kernel: `(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, ...)`; tensors of shape (tokens, heads, dim).
        takes: names of its further parameters.
    """

    name: ClassVar[str] = "varlen"

    kernel: Callable[..., Any]
    takes: frozenset[str]

    @classmethod
    def of(cls, kernel: Callable[..., Any] | None) -> Varlen | None:
        """Inspect a kernel; return None if it is missing, or cannot be causal and scaled."""
        takes = frozenset(inspect.signature(kernel).parameters) if kernel is not None else frozenset[str]()
        if kernel is None or "scale" not in takes or not takes & {"window_size", "is_causal"}:
            return None
        return cls(kernel, takes)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Find out now what would else be tried in the first pass, which may be watched and must not wait then."""
        if GROUPED not in self.takes:
            takes_groups(self.kernel, device, dtype)

    def fits(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> bool:
        """Return whether it can attend to rows of these tensors, shape (1, heads, tokens, dim), with this window."""
        sizes = {part.shape[-1] for part in (query, key, value)}
        fit = len(sizes) == 1 and all(size % MULTIPLE == 0 and size <= WIDEST for size in sizes)
        return fit and (window is None or "window_size" in self.takes)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: torch.Tensor,
        longest: int,
        *,
        window: int | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """Return the causal attention of each row to itself.

        Args:
            query: shape (1, heads, tokens, dim); key and value may have fewer heads, by a divisor.
            places: int32, shape (rows + 1,): the first token of each row, and the number of all tokens.
            longest: tokens of the longest row.
            window: how many tokens a token sees, including itself; None for all before it.

        Returns:
            The output, shape (1, tokens, heads, dim).
        """
        extra: dict[str, Any] = {"scale": query.shape[-1] ** -0.5 if scaling is None else scaling}
        if "window_size" in self.takes:
            extra["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            extra["is_causal"] = True
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and GROUPED in self.takes:
            extra[GROUPED] = True
        elif groups > 1 and not takes_groups(self.kernel, query.device, query.dtype):
            key, value = (_repeated(part, groups) for part in (key, value))
        rows = (part[0].transpose(0, 1) for part in (query, key, value))
        return self.kernel(*rows, places, places, longest, longest, **extra)[None]


@cache
def takes_groups(kernel: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel whose signature does not tell accepts fewer key and value heads; tried once."""
    if device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(24, heads, 16, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    places = torch.tensor([0, 9, 24], dtype=torch.int32, device=device)
    outcomes: list[list[torch.Tensor]] = []
    for own in ([query, key, value], [query, *(part.repeat_interleave(2, 1) for part in (key, value))]):
        leaves = [part.detach().requires_grad_() for part in own]
        try:
            with torch.enable_grad():
                out = kernel(*leaves, places, places, 15, 15, scale=0.25)
                grads = torch.autograd.grad(out.float().square().sum(), leaves)
        except Exception as error:  # it reports that the numbers of heads must be equal
            if is_of_the_device(error):
                raise
            return False
        outcomes.append([out.detach(), *grads])
    few, repeated = outcomes
    wanted = [*repeated[:2], *(grad.unflatten(1, (2, 2)).sum(2) for grad in repeated[2:])]
    pairs = zip(few, wanted, strict=True)
    return all(torch.allclose(one.float(), other.float(), atol=0.05, rtol=0.05) for one, other in pairs)


def _repeated(part: torch.Tensor, times: int) -> torch.Tensor:
    """Return every head repeated, shape (1, heads * times, tokens, dim); the gradient is a plain sum, in order."""
    _, heads, tokens, dim = part.shape
    return part[:, :, None].expand(1, heads, times, tokens, dim).reshape(1, heads * times, tokens, dim)


def _of_this_release() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


VARLEN = Varlen.of(_of_this_release())
"""The kernel of the installed PyTorch; None if it has no suitable one."""


def kernel_for(device: torch.device, dtype: torch.dtype) -> Varlen | None:
    """Return the kernel if it can be used: in a 16-bit type, on an NVIDIA GPU that FlashAttention supports."""
    if device.type != "cuda" or dtype not in HALF or torch.version.cuda is None:
        return None
    return VARLEN if torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY else None


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the attention kernel, for the record of the environment; "" on a CPU, which has only one."""
    if device.type == "cpu":
        return ""
    return "row by row" if kernel_for(device, dtype) is None else Varlen.name


@dataclass(frozen=True)
class RowKernel:
    """A kernel with its row arguments for a part: made once on the host, the same for all layers.

    Args:
        places: int32, shape (rows + 1,), on the computing device.
        longest: tokens of the longest row.
    """

    kernel: Varlen
    places: torch.Tensor
    longest: int

    @classmethod
    def of(
        cls, kernel: Varlen, lengths: Sequence[int], device: torch.device, shape: tuple[int, int] | None = None
    ) -> RowKernel:
        """Return the kernel for rows of these lengths; nothing waits for the copy to a GPU.

        Args:
            shape: how many rows, the last ones empty, and at least the tokens of the longest; by default as they are.
        """
        rows, longest = shape or (len(lengths), max(lengths))
        empty = [0] * (rows - len(lengths))
        places = torch.tensor([0, *accumulate([*lengths, *empty])], dtype=torch.int32)
        return cls(kernel, to_device(places, device), longest)

    def attend(
        self, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], window: int | None, scaling: float | None
    ) -> torch.Tensor:
        """Return the causal attention of each row to itself, shape (1, tokens, heads, dim).

        Args:
            rows: query, key and value, shape (1, heads, tokens, dim), in autocast's type if that is on: PyTorch does
                not cast for this kernel.
        """
        kind = rows[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows[0].dtype
        query, key, value = (part.to(dtype) for part in rows)
        return self.kernel(query, key, value, self.places, self.longest, window=window, scaling=scaling)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of main memory on a device; the copy to a GPU overlaps with what the host does next."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
