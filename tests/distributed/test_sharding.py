"""Models in shards: the bits of one device on any number of ranks, written by all of them, and whole again on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sharding_runs
import tiny
import torch
from groups import together
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onward.errors import DamagedState, ModelError
from onward.training.model.load import load_model
from onward.training.model.weights import save_weights
from onward.training.optimizers import ADAMW
from onward.training.sharding.files import MANIFEST, read_manifest, require_files
from onward.training.sharding.model import decoder_layers
from onward.training.sharding.shards import rows_of, span
from onward.training.sharding.whole import whole_state

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding has a number of rows that no number of ranks divides."""
    return tiny.save_tiny_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a state that two ranks trained for two steps."""
    folder = tmp_path_factory.mktemp("written")
    arguments = (model, range(2), None, folder / "two", torch.float32, False)
    assert [0, 0] == together(2, folder, sharding_runs.train_in_shards, *arguments)
    return folder / "two"


@pytest.mark.parametrize(("size", "recomputed"), [(4, True), (3, False)])
def test_two_ranks_and_then_others_give_the_bits_of_one_device(
    model: Path, written: Path, tmp_path: Path, size: int, recomputed: bool
) -> None:
    """Two steps on two ranks, then two on others, with four parts: weights, moments, losses and norms of one device."""
    arguments = (model, range(2, 4), written, tmp_path / "last", torch.float32, recomputed)
    assert [0] * size == together(size, tmp_path, sharding_runs.train_in_shards, *arguments)
    state, told = sharding_runs.on_one_device(model, "full", 4)
    first, last = (json.loads(path.with_suffix(".json").read_text()) for path in (written, tmp_path / "last"))
    assert told == first + last
    manifest = read_manifest(tmp_path / "last")
    whole = whole_state(tmp_path / "last", manifest, state.model, ADAMW, tmp_path)
    assert state.view().digest() == whole.state.digest()
    assert (size, 4, 4) == (manifest.ranks, manifest.count, whole.state.counters.step)


def test_half_precision_gives_the_bits_of_one_device(model: Path, tmp_path: Path) -> None:
    """Weights in float32, computed in bfloat16 by autocast, layers computed again in the backward pass."""
    arguments = (model, range(2), None, tmp_path / "half", torch.bfloat16, True)
    assert [0, 0] == together(2, tmp_path, sharding_runs.train_in_shards, *arguments)
    state, told = sharding_runs.on_one_device(model, "full", 2, torch.bfloat16)
    whole = whole_state(tmp_path / "half", read_manifest(tmp_path / "half"), state.model, ADAMW, tmp_path)
    assert told == json.loads((tmp_path / "half.json").read_text())
    assert state.view().digest() == whole.state.digest()


def test_adapters_beside_a_base_in_shards(model: Path, tmp_path: Path) -> None:
    """The frozen base lies in shards, the adapter whole on every rank: weights, moments, losses, norms are the same."""
    arguments = (model, 2, tmp_path / "adapter")
    assert [0, 0] == together(2, tmp_path, sharding_runs.train_beside_shards, *arguments)
    state, told = sharding_runs.on_one_device(model, "lora", 2)
    digest = state.view().digest()
    expected = [digest.weights, digest.moments, told]
    assert [expected, expected] == [json.loads((tmp_path / f"adapter.{rank}").read_text()) for rank in range(2)]


def test_a_checkpoint_is_made_of_shards(model: Path, written: Path, tmp_path: Path) -> None:
    """What is written of the whole state is, byte for byte, what one device writes, and transformers loads it."""
    state, _ = sharding_runs.on_one_device(model, "full", 2)
    whole = whole_state(written, read_manifest(written), state.model, ADAMW, tmp_path)
    for name, source, saved in (("one", state.model, state.view()), ("all", whole.model, whole.state)):
        (tmp_path / name).mkdir()
        save_weights(source, saved.weights, tmp_path / name)
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "all"))
    assert one == other
    loaded = dict(load_model(tmp_path / "all", model, CPU, torch.float32).named_parameters())
    assert all(torch.equal(weight, loaded[name]) for name, weight in state.view().weights.items())
    groups = state.optimizer.state_dict()["param_groups"]
    assert groups == whole.state.optimizer["param_groups"]


def test_a_rank_that_dies_leaves_no_state(model: Path, written: Path, tmp_path: Path) -> None:
    """A rank is killed while shards are written: the others end with an error, nothing appears, and what was stays."""
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    assert [1, -9] == together(2, tmp_path, sharding_runs.lose_a_rank, model, tmp_path / "torn")
    assert not (tmp_path / "torn").exists()
    assert before == {path.name: path.read_bytes() for path in written.iterdir()}
    require_files(written, read_manifest(written))


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone", "manifest", "no manifest"])
def test_damaged_shards_are_refused(written: Path, tmp_path: Path, harm: str) -> None:
    """A file that is missing or differs, and a manifest that is missing or differs, are told with their name."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in written.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    victim = folder / MANIFEST if "manifest" in harm else sorted(folder.glob("*.safetensors"))[1]
    data = victim.read_bytes()
    if harm in ("gone", "no manifest"):
        victim.unlink()
    else:
        victim.write_bytes(data[:-1] if harm == "shorter" else data.replace(b"1", b"2", 1))
    with pytest.raises(DamagedState) as refusal:
        require_files(folder, read_manifest(folder))
    assert victim == refusal.value.where


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 9))
def test_a_shard_is_computed_as_its_tensor_is(rows: int, numbers: int, ranks: int) -> None:
    """However wide the registers: numbers of a shard are computed together, or one by one, as in the whole tensor."""
    total = rows * numbers
    seen = 0
    for rank in range(ranks):
        first, last = (row * numbers for row in rows_of(rows, rank, ranks))
        assert seen == first
        seen = last
        start, end = span(first, last, total)
        assert start <= first <= last <= end <= total
        for width in (4, 8, 16):
            together_in_whole = range(min(last, total - total % width))
            together_here = range(min(last, start + (end - start) - (end - start) % width))
            assert [place in together_in_whole for place in range(first, last)] == [
                place in together_here for place in range(first, last)
            ]
    assert total == seen


def test_models_that_cannot_be_cut_are_refused() -> None:
    """No layers that transformers knows how to compute again: refused with the way out."""
    with pytest.raises(ModelError, match="cannot be cut into shards"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))
