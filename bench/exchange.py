"""What the exact exchange of gradients costs against a plain all-reduce, between the processes that torchrun starts.

torchrun --nproc-per-node 2 bench/exchange.py [--numbers 42000000] [--shares 2 4] [--rounds 10]

Prints, for each number of parts of a step, the shortest time of an exchange in milliseconds, without computing. LoRA of
rank 16 on a model of 8B has 42 million numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import nn

from onward.ranks import place_here
from onward.training.ranks.exchange import Exchange, InAnyOrder, InOrder
from onward.training.ranks.forming import form
from onward.training.ranks.group import Group

WEIGHTS = 8


def shortest(group: Group, exchange: Exchange, shares: int, weights: Sequence[nn.Parameter], rounds: int) -> float:
    """Return the shortest time of an exchange in seconds."""
    grads = [torch.randn_like(weight) for weight in weights]
    computing = 0.0

    def compute(_: Sequence[int]) -> torch.Tensor:
        nonlocal computing
        begun = time.perf_counter()
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone() if weight.grad is None else weight.grad.add_(grad)
        group.settle()
        computing += time.perf_counter() - begun
        return torch.zeros((), device=group.device)

    found: list[float] = []
    for _ in range(rounds):
        for weight in weights:
            weight.grad = None
        group.any(False)
        computing, begun = 0.0, time.perf_counter()
        exchange.total([[share] for share in range(shares)], compute, weights)
        found.append(time.perf_counter() - begun - computing)
    return min(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=42_000_000)
    parser.add_argument("--shares", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    place = place_here()
    assert place is not None, "started by torchrun"
    group = form(place, 60.0, print)
    weights = [nn.Parameter(torch.zeros(given.numbers // WEIGHTS, device=group.device)) for _ in range(WEIGHTS)]
    for shares in given.shares:
        exact = shortest(group, InOrder(group), shares, weights, given.rounds)
        fast = shortest(group, InAnyOrder(group), shares, weights, given.rounds)
        if group.rank == 0:
            print(f"{shares} parts: exact {exact * 1e3:.1f} ms, fast {fast * 1e3:.1f} ms, {exact / fast:.2f} times")
    group.end()


if __name__ == "__main__":
    main()
