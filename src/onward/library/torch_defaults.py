"""What a caller or an observer has set for torch, left while a run computes and set again afterwards."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Generator
from typing import Any

from onward.events import Event, Observe

_ATTENTION = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
"""Kernels of attention that a process can rule out; those of a CPU ask the same switches."""


@contextlib.contextmanager
def defaults_of_torch() -> Generator[None]:
    """Compute in the body as torch does by default, whatever the caller has set, such as `no_grad`.

    A default device stays: a model that cannot be loaded for it is refused. So do the number of threads, and TF32 on a
    GPU: they are recorded with the state.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:  # then nobody has set anything
        yield
        return
    settings = [(read, write, read(), default) for read, write, default in _settings(torch)]
    try:
        for _, write, value, default in settings:
            if value != default is not None:
                write(default)
        with torch.inference_mode(False), torch.enable_grad(), _no_autocast(torch):
            yield
    finally:
        for read, write, value, _ in settings:
            if read() != value:  # to set the same number of threads again would change how MKL uses them
                write(value)


def undisturbed(observe: Observe) -> Observe:
    """Return an observer after which torch is set as before: what it sets would change the steps that follow."""

    def observed(event: Event) -> None:
        with defaults_of_torch():
            observe(event)

    return observed


def _settings(torch: Any) -> list[tuple[Callable[[], Any], Callable[[Any], object], Any]]:
    """Return the process's settings that bits depend on: what reads and writes each, and its default if it has one."""
    cuda, products = torch.backends.cuda, getattr(torch.backends.mkldnn, "matmul", None)
    found: list[tuple[Callable[[], Any], Callable[[Any], object], Any]] = [
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        (torch.get_num_threads, torch.set_num_threads, None),
    ]
    found += [(getattr(cuda, f"{name}_enabled"), getattr(cuda, f"enable_{name}"), True) for name in _ATTENTION]
    if products is not None:  # since torch 2.9
        name = "fp32_precision"
        found.append((functools.partial(getattr, products, name), functools.partial(setattr, products, name), "ieee"))
    return found


@contextlib.contextmanager
def _no_autocast(torch: Any) -> Generator[None]:
    """Leave the caller's autocast in the body, so that one in the body is the outermost.

    Only the outermost one forgets, at its end, the weights that it cast: in any other, even a disabled one, all steps
    would compute with the weights of the first.
    """
    enabled = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    keeps = torch.is_autocast_cache_enabled()
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)
    for device in enabled:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device, was_enabled in enabled.items():
            torch.set_autocast_enabled(device, was_enabled)
        torch.set_autocast_cache_enabled(keeps)
        for _ in range(depth):
            torch.autocast_increment_nesting()
