"""AdamW with 8-bit moments, by the kernels of bitsandbytes (Dettmers et al., 2022, arXiv:2110.02861).

A moment is rounded to one of 256 values, times the largest number of its block. That is done in each step, by block, so
equal gradients give equal bits, in one process or many. The code that drives the kernels is Onward's own: the optimizer
of bitsandbytes waits for the device after each weight and keeps process-wide settings by the addresses of weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import nn

BLOCK = 256
"""How many numbers share a scale."""
LEAST = 4096
"""The size of a weight from which its moments have 8 bits, as in bitsandbytes; smaller ones have 32."""
CODEBOOKS = ("qmap1", "qmap2")


def is_rounded(weight: torch.Tensor) -> bool:
    """Whether the moments of a weight have 8 bits."""
    return weight.numel() >= LEAST


def blocks_of(weight: torch.Tensor) -> int:
    """Return how many scales a moment of a weight has."""
    return -(-weight.numel() // BLOCK)


@cache
def codebooks() -> Mapping[str, torch.Tensor]:
    """Return the values that the two moments are rounded to, float32, shape (256,), in main memory.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    made = _kernels().create_dynamic_map
    return dict(zip(CODEBOOKS, (made(signed=True), made(signed=False)), strict=True))


def _kernels() -> Any:
    return importlib.import_module("bitsandbytes.functional")


class BlockwiseAdamW(torch.optim.Optimizer):
    """AdamW that keeps `state1` and `state2` as integers with a scale per block, `absmax1` and `absmax2`.

    The counters are in main memory, since the kernels take a plain number.

    Args:
        groups: parameter groups.
        lr, eps: defaults of the groups.

    Raises:
        ImportError: bitsandbytes is not installed.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, eps: float) -> None:
        self._kernels = _kernels()
        self._codebooks: dict[torch.device, list[torch.Tensor]] = {}
        rest = {"weight_decay": 0.0, "alpha": 0.0, "t_alpha": None, "t_beta3": None}  # bitsandbytes' values
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": eps, **rest})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step; every parameter must have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in cast(list[nn.Parameter], group["params"]):
                if weight.grad is not None:
                    entry = self.state[weight] or self._begin(weight)
                    entry["step"] += 1
                    self._update(group, weight, entry)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and entries; types stay as they are, whereas PyTorch would convert all to the weight's."""
        super().load_state_dict({**state_dict, "state": {}})
        order = [key for group in state_dict["param_groups"] for key in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for key, weight in zip(order, weights, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[weight][name] = value if name == "step" else value.to(weight.device)

    def _begin(self, weight: nn.Parameter) -> dict[str, torch.Tensor]:
        kind = torch.uint8 if is_rounded(weight) else torch.float32
        entry = self.state[weight]
        entry["step"] = torch.zeros(())
        for slot in ("state1", "state2"):
            entry[slot] = torch.zeros_like(weight, dtype=kind)
        for slot in ("absmax1", "absmax2") if is_rounded(weight) else ():
            entry[slot] = torch.zeros(blocks_of(weight), device=weight.device)
        return entry

    def _update(self, group: dict[str, Any], weight: nn.Parameter, entry: dict[str, torch.Tensor]) -> None:
        (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
        step, grad = int(entry["step"]), cast(torch.Tensor, weight.grad).contiguous()
        if entry["state1"].dtype != torch.uint8:
            self._kernels.optimizer_update_32bit(
                "adam", grad, weight, entry["state1"], beta1, eps, step, lr, entry["state2"], beta2, weight_decay=decay
            )
            return
        kept = self._codebooks.get(weight.device)
        if kept is None:
            kept = self._codebooks[weight.device] = [each.to(weight.device) for each in codebooks().values()]
        self._kernels.optimizer_update_8bit_blockwise(
            "adam", grad, weight, entry["state1"], entry["state2"], beta1, beta2, 0.0, 0.0, eps, step, lr, *kept,
            entry["absmax1"], entry["absmax2"], weight_decay=decay,
        )  # fmt: skip
