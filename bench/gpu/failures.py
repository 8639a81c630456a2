"""What a recording that fails leaves behind: `failures.py`. A CPU records nothing, and nothing is reported there.

One fails in Python, then one on the device, in one process. After each of them random numbers and steps must have the
bits that they had before, other recordings must work, and without these all memory must be free.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from record import emit
from shapes import device
from torch import nn
from turns import wait

Compute = Callable[[], torch.Tensor]
Record = Callable[[Callable[[], object]], Compute]
"""Records a computation and returns its replay."""
LARGE = 64 << 20
"""How many numbers a recording that fails has allocated, four bytes each."""


def wrong_after(fail: Callable[[], object], where: torch.device, record: Record, *, ends_others: bool) -> list[str]:
    """Let a recording fail and return what is not as it was before.

    Args:
        fail: what is recorded; raises.
        ends_others: whether recordings made before must not be replayed any more.
    """
    weight = nn.Parameter(torch.ones(64, 64, device=where))
    computed = {"random numbers": partial(torch.rand, 100, device=where), "a step": partial(_step, weight)}
    wanted = {name: _seeded(compute) for name, compute in computed.items()}
    before, earlier = _reserved(), record(computed["random numbers"])
    wrong: list[str] = []
    try:
        record(fail)
        wrong.append("it did not fail")
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"the recording failed as it should: {first}")
    wrong += [f"{name}: other bits" for name in computed if not torch.equal(_seeded(computed[name]), wanted[name])]
    if torch.cuda.is_available() and torch.ones(8).pin_memory().to(where, non_blocking=True).sum() != 8:
        wrong.append("pinned memory: other bits")
    again = {"a recording made before": earlier, "another recording": record(computed["random numbers"])}
    for name, replay in again.items():
        try:
            said = "" if torch.equal(_seeded(replay), wanted["random numbers"]) else "other bits"
        except RuntimeError as error:
            said = "" if ends_others and replay is earlier else str(error)
        else:
            said = "it is replayed" if ends_others and replay is earlier else said
        wrong += [f"{name}: {said}"] if said else []
    del earlier, again, replay  # recordings share memory: it is free when the last of them is gone
    if _reserved() >= before + LARGE:
        wrong.append(f"{(_reserved() - before) >> 20} MiB are not free")
    return wrong


def _step(weight: nn.Parameter) -> torch.Tensor:
    weight.grad = None
    (nn.functional.dropout(weight, 0.5) @ weight).sum().backward()
    assert weight.grad is not None
    return weight.grad


def _seeded(compute: Compute) -> torch.Tensor:
    torch.manual_seed(5)
    return compute().clone()


def _reserved() -> int:
    """Return the bytes that this process keeps of a GPU when it has returned what it can."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def main() -> None:
    """Let recordings fail."""
    from onward.training.layers.recording import Recording, RecordingPlace

    where = device()
    if where.type != "cuda":
        return

    def in_python() -> None:
        torch.rand(LARGE, device=where)
        raise KeyError("no")

    def on_the_device() -> None:
        torch.rand(LARGE, device=where).sum().item()

    place = RecordingPlace(where)
    for fail, ends_others in ((in_python, False), (on_the_device, True)):
        wrong = wrong_after(fail, where, lambda compute: Recording(compute, place), ends_others=ends_others)  # type: ignore[return-value]
        instant = fail.__name__.replace("_", " ")
        emit("failed recording", instant=instant, equal=not wrong, said="; ".join(wrong)[:300])


if __name__ == "__main__":
    from onward import startup

    startup.set_environment()
    wait()
    main()
