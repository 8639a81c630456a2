"""What a step takes of memory, as it follows from what was measured of the model and from the config."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from late_copies import Late

from onward.config import Config
from onward.training.layers.cross_entropy import CHUNK_BYTES, LOGITS_BYTES, TILE_BYTES
from onward.training.steps.memory import Polynomial, Profile, largest_part, largest_texts, most_of, part_tokens
from onward.training.steps.model_memory import pinned
from onward.training.transfer import Overlapped


def test_gradients_that_are_added_apart_count_twice() -> None:
    """Those of a share that has several parts are added before they are added to those of the other shares."""
    profile = Profile(0, 50_000, 0, Polynomial(0.0, 100.0, 0.0), None, 10, 1, 0, "cuda")
    settings = ({}, {"parts": 2}, {"gradient_accumulation": 4}, {"parts": 2, "gradient_accumulation": 4})
    found = [most_of(profile, Config.model_validate(each)).gradients for each in settings]
    assert [50_000, 50_000, 50_000, 100_000] == found


def test_gradients_take_the_place_of_activations() -> None:
    """On a CPU a step of one part has either all activations or all gradients; further parts begin with gradients."""
    linear = Polynomial(0.0, 100.0, 0.0)
    profile = Profile(0, 50_000, 0, linear, None, 10, 1, 0, "cpu", "full")
    few, many = profile.estimate([100], alone=True), profile.estimate([1000], alone=True)
    assert (50_000, 0) == (few.gradients + few.activations + few.logits, many.gradients)
    assert 50_000 == profile.estimate([1000]).gradients
    on_gpu = replace(profile, device="cuda")
    assert on_gpu.estimate([1000], alone=True) == on_gpu.estimate([1000])


@pytest.mark.parametrize(("device", "chunk"), [("cpu", LOGITS_BYTES), ("cuda", CHUNK_BYTES["cuda"])])
def test_logits_of_a_trained_head_are_those_of_a_chunk_on_its_device(device: str, chunk: int) -> None:
    """A GPU computes more tokens at a time; neither keeps more logits than the part has."""
    profile = Profile(0, 9_000, 0, Polynomial(0, 1, 0), None, 10, 100_000, 3_000, device, "full")
    assert [2 * 4 * 8 * 100_000 + 9_000, 2 * chunk + 9_000] == [
        profile.estimate([length]).logits for length in (8, 10_000)
    ]


def test_a_copy_from_a_gpu_takes_what_pytorch_rounds_it_up_to() -> None:
    """Each storage of pinned memory has a power of two bytes; the copy has one for each large weight, and two more."""
    shapes = [(3000, 700), (50, 60), (1100, 1000), (70,)]
    weights, moments = ([torch.zeros(*shape) for _ in range(copies) for shape in shapes] for copies in (1, 2))
    memory = Overlapped(Late(), pins=False).copy(weights, moments).memory
    assert memory is not None
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in memory.tensors}
    sizes = [weight.nbytes for weight in weights]
    taken = pinned(sizes, 2 * sum(sizes))
    assert sum(1 << (size - 1).bit_length() for size in storages.values()) == taken
    assert taken > 1.2 * 3 * sum(sizes)
    assert 0 == pinned([], 0)


def test_the_tokens_of_a_part_follow_from_memory() -> None:
    """The most that fit without recomputation, else with it up to the usual number, never fewer than the least."""
    one = Polynomial(0.0, 1000.0, 0.0)
    few = Polynomial(0.0, 100.0, 0.0)
    profile = Profile(10_000, 10, 20, one, few, 10, 1, 0, "cuda")
    rooms = (40_000_000, 37_000_000, 10_000_000, 1_900_000, 700_000, 10)
    assert [32768, 32768, 8192, 4096, 2048, 2048] == [part_tokens(profile, room, 1024) for room in rooms]


def test_the_largest_part_of_a_step() -> None:
    """It follows from the tokens of a part, from the rows of a step, or from the parts that the config asks for."""
    assert [1024] * 8 == largest_part(Config())
    assert [1024] * 4 == largest_part(Config.model_validate({"micro_batch_tokens": 4500}))
    assert [2048] == largest_part(Config.model_validate({"micro_batch_tokens": 100, "max_length": 2048}))
    assert [1024] * 3 == largest_part(Config.model_validate({"gradient_accumulation": 3}))


def test_the_texts_of_the_anchor_count_where_they_are_larger() -> None:
    """One for eight rows of a step, as many at once as a part has tokens, their logits for some tokens at a time."""
    profile = Profile(0, 0, 0, Polynomial(0.0, 1000.0, 0.0), None, 10, 1 << 18, 0, "cpu")
    counts: list[int] = []
    for settings in ({}, {"weight": 0.0}, {"rows": 0}, {"tokens": 200}, {"tokens": 5000}):
        anchor = {"weight": 0.5, "tokens": 1500, **settings}
        config = Config.model_validate({"batch_size": 72, "max_length": 10, "anchor": anchor})
        texts = largest_texts(config)
        assert texts == [config.anchor.tokens] * len(texts)
        counts.append(len(texts))
        logits = 4 * LOGITS_BYTES if texts else 2 * TILE_BYTES["cpu"]
        assert logits == most_of(profile, config).logits
    assert [5, 0, 0, 9, 1] == counts
    few = Config.model_validate({"batch_size": 8, "max_length": 1024, "anchor": {"weight": 0.5, "tokens": 8}})
    assert profile.estimate([1024] * 8, alone=True) == most_of(profile, few)
