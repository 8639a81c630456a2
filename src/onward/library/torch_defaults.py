"""What a caller or an observer has set for torch, left while a run computes and set again afterwards."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
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
    with _host.left(_settings(torch)), _own_thread(torch):
        yield


def undisturbed(observe: Observe) -> Observe:
    """Return an observer after which torch is set as before: what it sets would change the steps that follow."""

    def observed(event: Event) -> None:
        torch: Any = sys.modules.get("torch")
        if torch is None:
            observe(event)
            return
        before = [(setting, setting.read()) for setting in _settings(torch)]
        try:
            with _own_thread(torch):
                observe(event)
        finally:
            _set_again(before)

    return observed


@dataclass(frozen=True)
class _Setting:
    """A setting of the process: what reads and writes it, and its default; None if any value is as good."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    default: Any = None


class _Host:
    """What the process had set before the first of its threads began to compute; the last one to end sets it again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._computing = 0
        self._theirs: list[tuple[_Setting, Any]] = []

    @contextlib.contextmanager
    def left(self, settings: list[_Setting]) -> Generator[None]:
        """Have every setting at its default in the body."""
        with self._lock:
            if not self._computing:
                self._theirs = [(setting, setting.read()) for setting in settings]
                _set_again([(one, one.default) for one in settings if one.default is not None])
            self._computing += 1
        try:
            yield
        finally:
            with self._lock:
                self._computing -= 1
                if not self._computing:
                    _set_again(self._theirs)


_host = _Host()
"""One for the process, as the settings are."""


def _set_again(values: list[tuple[_Setting, Any]]) -> None:
    for setting, value in values:
        if setting.read() != value:  # to set the same number of threads again would change how MKL uses them
            setting.write(value)


def _settings(torch: Any) -> list[_Setting]:
    """Return the process's settings that bits depend on."""
    cuda, products = torch.backends.cuda, getattr(torch.backends.mkldnn, "matmul", None)
    found = [
        _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _Setting(torch.get_num_threads, torch.set_num_threads),
    ]
    found += [_Setting(getattr(cuda, f"{name}_enabled"), getattr(cuda, f"enable_{name}"), True) for name in _ATTENTION]
    if products is not None:  # since torch 2.9
        name = "fp32_precision"
        read, write = functools.partial(getattr, products, name), functools.partial(setattr, products, name)
        found.append(_Setting(read, write, "ieee"))
    return found


@contextlib.contextmanager
def _own_thread(torch: Any) -> Generator[None]:
    """Have this thread's settings at their defaults in the body."""
    with torch.inference_mode(False), torch.enable_grad(), _no_autocast(torch):
        yield


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
