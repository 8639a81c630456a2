"""On a GPU: what is recorded and replayed has the bits of what is computed as usual, and a failed recording leaves
nothing behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import DEVICE, ON_CPU, VARIANTS, needs_gpu, save_model, write_files
from processes import train
from states import assert_same_state

from onward import Run
from onward.training.layers.recording import Recordable, Recording, RecordingPlace, is_held, recorder_for
from onward.training.transfer import fetch_later

pytestmark = [*needs_gpu, pytest.mark.skipif(ON_CPU, reason="a CPU records nothing")]


def test_a_replay_computes_with_the_current_numbers() -> None:
    """Numbers are read anew, and random numbers follow from the seed, as without a recording."""
    weight = torch.ones(64, 64, device=DEVICE)

    def compute() -> torch.Tensor:
        return torch.nn.functional.dropout(weight, 0.5) @ weight

    torch.cuda.manual_seed(5)
    usual = compute()
    replay = Recording(compute, RecordingPlace(DEVICE))
    torch.cuda.manual_seed(5)
    assert torch.equal(usual, replay())
    weight.mul_(3.0)
    torch.cuda.manual_seed(6)
    usual = compute()
    torch.cuda.manual_seed(6)
    assert torch.equal(usual, replay())


def test_a_recording_that_fails_leaves_nothing_behind() -> None:
    """Something in it waits for the device: it is refused, and random numbers and later recordings are as before.

    Its memory is free again. What was recorded before it is not replayed.
    """
    torch.cuda.manual_seed(5)
    wanted = torch.rand(100, device=DEVICE)
    earlier = Recording(lambda: torch.rand(100, device=DEVICE), RecordingPlace(DEVICE))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(DEVICE)
    place = RecordingPlace(DEVICE)
    with pytest.raises(RuntimeError):
        Recording(lambda: torch.rand(64 << 20, device=DEVICE).sum().item(), place)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) < before + (64 << 20)
    torch.cuda.manual_seed(5)
    assert torch.equal(wanted, torch.rand(100, device=DEVICE))
    assert torch.ones(8).pin_memory().to(DEVICE, non_blocking=True).sum() == 8
    with pytest.raises(RuntimeError, match="another recording failed"):
        earlier()
    replay = Recording(lambda: torch.rand(100, device=DEVICE), place)
    torch.cuda.manual_seed(5)
    assert torch.equal(wanted, replay())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyError])
def test_an_error_of_the_host_ends_a_recording_too(error: type[Exception]) -> None:
    """It is raised as it is; recordings made before it stay, and others can be made."""
    place = RecordingPlace(DEVICE)
    earlier = Recording(lambda: torch.rand(100, device=DEVICE), place)

    def fail() -> None:
        torch.rand(1000, device=DEVICE)
        raise error("no")

    with pytest.raises(error, match="no"):
        Recording(fail, place)
    for replay in (earlier, Recording(lambda: torch.rand(100, device=DEVICE), place)):
        torch.cuda.manual_seed(6)
        wanted = torch.rand(100, device=DEVICE)
        torch.cuda.manual_seed(6)
        assert torch.equal(wanted, replay())


def test_a_step_after_a_failed_recording_is_computed() -> None:
    """Dropout, a backward pass and a product, on the stream that every step uses."""
    weight = torch.nn.Parameter(torch.ones(64, 64, device=DEVICE))

    def step() -> torch.Tensor:
        weight.grad = None
        (torch.nn.functional.dropout(weight, 0.5) @ weight).sum().backward()
        assert weight.grad is not None
        return weight.grad

    torch.cuda.manual_seed(5)
    wanted = step().clone()
    with pytest.raises(RuntimeError):
        Recording(lambda: step().sum().item(), RecordingPlace(DEVICE))
    torch.cuda.manual_seed(5)
    assert torch.equal(wanted, step())


def test_what_is_fetched_later_is_not_overwritten() -> None:
    """It has the values that were computed when it was asked for, whatever the device computes before it is read."""
    total = torch.zeros(1000, dtype=torch.int64, device=DEVICE)
    replay = Recording(lambda: total.add_(1), RecordingPlace(DEVICE))
    before = int(total[0])
    reads = [fetch_later([replay(), total[:1]]) for _ in range(20)]
    for turn, read in enumerate(reads, start=before + 1):
        assert [turn, turn] == [int(each.unique()) for each in read()]


def test_what_waits_is_found_before() -> None:
    """It is computed as usual, each time."""
    values = torch.arange(10.0, device=DEVICE)
    compute = Recordable(lambda: float(values.sum()), DEVICE, recorder_for(DEVICE))
    assert [45.0, 45.0] == [compute(), compute()]
    assert not compute.can_record
    assert not compute.record()


def test_a_held_weight_is_found() -> None:
    """As long as the graph of an earlier computation is there."""
    weight = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    assert not is_held(weight)
    loss = (weight * 2).sum()
    assert is_held(weight)
    del loss
    assert not is_held(weight)


@pytest.mark.parametrize("variant", ["lora-bfloat16", "full-bfloat16", "anchored-bfloat16"])
def test_replays_in_one_process_and_in_three(variant: str, tmp_path: Path) -> None:
    """With dropout: a process that replays most steps leaves the state of processes that replay few."""
    base, files = save_model(tmp_path / "model"), write_files(tmp_path)
    settings: dict[str, Any] = {"batch_size": 2, "max_length": 512, "warmup_steps": 2, "save_steps": 5}
    runs = [
        Run.create(tmp_path / name, str(base), later=True, **{**settings, **VARIANTS[variant]}).layout.root
        for name in ("one", "three")
    ]
    assert 0 == train(runs[0], files)
    assert [0, 0, 0] == [train(runs[1], [file]) for file in files]
    assert_same_state(*runs)
    assert ["bitwise"] * 3 == [entry["handover"] for entry in Run(runs[0]).history()]
