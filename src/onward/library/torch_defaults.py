"""What a caller has set for torch, left while a run computes and set again afterwards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import Any


@contextlib.contextmanager
def defaults_of_torch() -> Generator[None]:
    """Compute in the body as torch does by default, whatever the caller has set, such as `no_grad`.

    A default device stays: a model that cannot be loaded for it is refused.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:  # then nobody has set anything
        yield
        return
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _no_autocast(torch):
            yield
    finally:
        torch.set_default_dtype(kind)


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
