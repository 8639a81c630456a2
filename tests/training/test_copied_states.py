"""What is fetched from a device later, and whole states that are copied: as they were, and as a copy in place is."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from late_copies import Late
from peft import LoraConfig, get_peft_model
from rows import CPU, tiny_model

from onward.config import Config
from onward.training.checkpoints import huggingface
from onward.training.model.roundtrip import prove_roundtrip
from onward.training.model.weights import save_weights
from onward.training.optimizers import file_state
from onward.training.state import TrainState
from onward.training.transfer import (
    InPlace,
    Overlapped,
    Sizes,
    beside_training,
    fetch_later,
    in_main_memory,
)
from onward.training.transfer.fetching import FETCHED


def test_what_lies_elsewhere_is_fetched_in_pieces() -> None:
    """Tensors are asked for one after another and held back up to a size; what is in main memory is held back only by
    what comes before it, and not copied."""
    asked: list[str] = []
    half = torch.zeros(FETCHED // 2, dtype=torch.uint8)
    here = torch.empty(2, FETCHED, dtype=torch.uint8, device="meta").t()  # not to be fetched, however large
    tensors = {"0": half, "1": here, "2": half[:-1], "3": half[:1], "4": half[:-1]}
    tensors |= {"5": half.view(torch.int16).view(2, -1), "6": half[:1], "7": here, "8": here}

    def ask() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            asked.append(name)
            yield name, tensor

    fetched = in_main_memory(ask(), home="meta")
    steps = [(name, asked[-1], tensor.shape, tensor.is_contiguous()) for name, tensor in fetched]
    expected = zip("012345678", "333366678", strict=True)
    assert [(name, last, tensors[name].shape, True) for name, last in expected] == steps


def test_what_is_fetched_later_is_as_it_was() -> None:
    """What is computed meanwhile may overwrite the tensors; nothing is fetched of none."""
    tensor = torch.zeros(3)
    read = fetch_later([tensor])
    tensor += 1
    assert [[0.0] * 3] == [each.tolist() for each in read()]
    assert [] == fetch_later([])()


def state_of(method: str, *, tied: bool = False) -> TrainState:
    """Return the state of step 0 of a tiny model."""
    model = tiny_model("llama", "sdpa", tie_word_embeddings=tied)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))  # pyright: ignore
    return TrainState.start(model, Config.model_validate({"method": method}))


def step(state: TrainState) -> None:
    """Take a step of random gradients."""
    for parameter in state.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()


class Streams:
    """Stands in for `torch.cuda`; notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def Stream(self, device: torch.device, priority: int) -> Any:
        self.asked.append(f"a stream of priority {priority} on {device}")
        return self

    def wait_stream(self, other: str) -> None:
        self.asked.append(f"wait for {other}")

    def current_stream(self, device: torch.device) -> str:
        return f"the steps on {device}"

    @contextlib.contextmanager
    def stream(self, side: Streams) -> Generator[None]:
        assert side is self
        self.asked.append("begin")
        yield
        self.asked.append("end")


def test_frozen_weights_leave_a_gpu_beside_its_steps() -> None:
    """On one stream for the whole process, which no recording can have; on a CPU nothing is asked of anybody."""
    streams, gpu = Streams(), torch.device("cuda", 1)
    for device in (CPU, gpu, gpu):
        with beside_training(device, streams):
            streams.asked.append("copy")
    each = ["wait for the steps on cuda:1", "begin", "copy", "end"]
    assert ["copy", "a stream of priority -1 on cuda:1", *each, *each] == streams.asked


@pytest.mark.parametrize("small", [0, 1000, 1 << 22])
@pytest.mark.parametrize(("method", "tied"), [("lora", False), ("full", False), ("full", True)])
def test_files_are_those_of_a_copy_in_place(method: str, tied: bool, small: int, tmp_path: Path) -> None:
    """From step 0 on, digests are equal, weights' files are equal by the byte, and moments load equal; the file of the
    moments has room for nothing else."""
    torch.manual_seed(0)
    state, late, plain = state_of(method, tied=tied), None, None
    way = Overlapped(Late(), pins=False, sizes=Sizes(small=small, slot=8192, slots=2))
    for turn in range(3):
        state.transfer = InPlace()
        plain = state.snapshot(into=plain)
        state.transfer = way
        late = state.snapshot(into=late)
        digest = late.digest()
        assert plain.digest() == digest
        assert state.is_proven(late)
        assert plain.plain() == late.plain()
        folders = [tmp_path / f"{name}-{turn}" for name in ("plain", "late")]
        for folder, copy in zip(folders, (plain, late), strict=True):
            folder.mkdir()
            save_weights(state.model, copy.weights, folder)
            huggingface.save(file_state(copy.method, copy.optimizer), folder / "optimizer.pt")
            prove_roundtrip(state.model, folder, copy.weights)
        one, other = ({path.name: path.stat().st_size for path in folder.iterdir()} for folder in folders)
        assert one == other
        name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
        saved, loaded = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in folders)
        assert saved["param_groups"] == loaded["param_groups"]
        assert [[*entry] for entry in saved["state"].values()] == [[*entry] for entry in loaded["state"].values()]
        values = [[each for entry in own["state"].values() for each in entry.values()] for own in (saved, loaded)]
        assert all(map(torch.equal, *values))
        step(state)
        state.optimizer.param_groups[0]["lr"] = 0.1 / (turn + 1)
    state.reset_moments()
    assert state.snapshot(into=late).digest() == state.view().digest()


def test_a_state_that_moved_on_is_not_the_one_that_was_copied() -> None:
    """A step changes all of it; an older copy is not proven by a newer one."""
    state = state_of("lora")
    state.transfer = Overlapped(Late(), pins=False)
    step(state)
    copied = state.snapshot()
    step(state)
    assert not state.is_proven(copied)
    newer = state.snapshot()
    assert [False, True] == [state.is_proven(copied), state.is_proven(newer)]
