"""Reads tensors in main memory, wherever they are: many small ones in one copy, which waits for the device once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

FETCHED = 1 << 26
"""Bytes that are fetched at once, unless a tensor is larger."""

Named = tuple[str, torch.Tensor]


def fetch_later(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Begin to copy small tensors of one device to main memory; return a function that waits for them, in any thread.

    They are copied after what was computed so far, and what is computed afterwards may overwrite them.
    """
    if not tensors or tensors[0].device.type != "cuda":
        copies = [tensor.to("cpu", copy=True) for tensor in tensors]
        return lambda: copies
    pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for target, source in zip(pinned, tensors, strict=True):
        target.copy_(source, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensors[0].device))

    def read() -> list[torch.Tensor]:
        copied.synchronize()
        return pinned

    return read


@contextlib.contextmanager
def beside_training(device: torch.device, cuda: Any = torch.cuda) -> Generator[None]:
    """Read what training never changes, such as frozen weights, from a GPU in the body, beside the steps.

    Without it, any thread's copies go through the stream that computes the steps, which would wait for them.

    Args:
        cuda: `torch.cuda`, or a substitute for it.
    """
    if device.type != "cuda":
        yield
        return
    side = _side_of(device, cuda)
    side.wait_stream(cuda.current_stream(device))
    with cuda.stream(side):
        yield


@cache
def _side_of(device: torch.device, cuda: Any) -> Any:
    """Return a stream that is no recording's: PyTorch hands out the same few again, apart for each priority."""
    return cuda.Stream(device, priority=-1)


def in_main_memory(tensors: Iterable[Named], home: str = "cpu") -> Iterator[Named]:
    """Yield tensors in the order given, contiguous and in main memory; at most `FETCHED` bytes are held back.

    Args:
        home: the type of device whose tensors are yielded as they are.
    """
    waiting: list[Named] = []
    size = 0
    for name, tensor in tensors:
        is_home = tensor.device.type == home
        if is_home and not waiting:
            yield name, tensor.detach().contiguous()
            continue
        waiting.append((name, tensor.detach()))
        size += 0 if is_home else tensor.numel() * tensor.element_size()
        if size >= FETCHED:
            yield from _fetched(waiting, home)
            waiting, size = [], 0
    yield from _fetched(waiting, home)


def _fetched(waiting: list[Named], home: str) -> Iterator[Named]:
    """Yield copies of tensors that are not at home, made with one copy per device and type, in turn with the others."""
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for _, tensor in waiting:
        if tensor.device.type != home:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor.reshape(-1))
    parts = {kind: iter(torch.cat(flat).cpu().split([len(each) for each in flat])) for kind, flat in alike.items()}
    for name, tensor in waiting:
        if tensor.device.type == home:
            yield name, tensor.contiguous()
        else:
            yield name, next(parts[tensor.device, tensor.dtype]).view(tensor.shape)
