"""Whether a shape trains on a smaller card: `room.py SHAPE METHOD GIBIBYTES [OPTIMIZER]`.

The process is given as much memory as such a card leaves it; PyTorch refuses more. Rows have 2,048 tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from own_steps import onward_steps, onward_trainer
from record import emit
from turns import wait

RUNTIME = 600 << 20
"""Bytes that CUDA and its libraries take of a card, outside of what PyTorch allocates."""
STEPS = 2


def fits(shape: str, method: str, gibibytes: float, **settings: Any) -> None:
    """Report whether steps fit into a card of this size, and how fast they are there."""
    from onward.training.device.errors import is_out_of_memory
    from onward.training.device.memory import Usage

    limit, has_gpu = int(gibibytes * (1 << 30)) - RUNTIME, torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)

    def read(_: torch.device) -> Usage:
        own = torch.cuda.memory_reserved() if has_gpu else 0
        return Usage(limit, limit - own, own)

    found: dict[str, Any] = {"shape": shape, "method": method, "gibibytes": gibibytes, **settings}
    try:
        trainer = onward_trainer(shape, method, read=read, **settings)
        steps = list(onward_steps(trainer, shape, "packed", STEPS, 1))[1:]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        emit("fits", **found, fits=False, said=str(error).splitlines()[0][:200])
        return
    rate = sum(tokens for _, tokens in steps) / sum(seconds for seconds, _ in steps)
    peak = torch.cuda.max_memory_reserved() if has_gpu else None
    part = trainer.config.part_tokens
    emit("fits", **found, fits=True, peak=peak, tokens_per_second=rate, part_tokens=part)


def main() -> None:
    """Try one shape."""
    shape, method, gibibytes, *optimizer = sys.argv[1:]
    fits(shape, method, float(gibibytes), **({"optimizer": optimizer[0]} if optimizer else {}))


if __name__ == "__main__":
    from onward import startup

    startup.set_environment()
    wait()
    main()
