"""Models in shards: the bits of one device on any number of ranks, written by all of them, and whole again on disk."""

from __future__ import annotations

import errno
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import sharding_runs
import tiny
import torch
from checkpoints import files_of
from hypothesis import given
from hypothesis import strategies as st
from ranks import call_on_ranks
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from onward.atomic import TEMPORARY_PREFIX
from onward.errors import DamagedState, Unreadable
from onward.layout import MANIFEST as MANIFEST_OF_CHECKPOINT
from onward.training.checkpoints.checkpoint import write_checkpoint
from onward.training.checkpoints.huggingface import OPTIMIZER
from onward.training.checkpoints.loading import load_moments
from onward.training.device.execution import Execution
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.optimizers import ADAMW
from onward.training.sharding.files import FORMAT, MANIFEST, read_manifest, require_files
from onward.training.sharding.gathering import rows_of
from onward.training.sharding.shards import span
from onward.training.sharding.whole import whole_state
from onward.training.state import TrainState
from onward.training.trainer import Trainer
from onward.training.world import SingleProcess

pytestmark = pytest.mark.shards
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
    assert [0, 0] == call_on_ranks(sharding_runs.in_group, 2, sharding_runs.train_in_shards, *arguments)
    return folder / "two"


@pytest.fixture(scope="module")
def committed(model: Path, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that is made of those shards, as a commit makes it."""
    folder = tmp_path_factory.mktemp("committed")
    _, bare = sharding_runs.built(model, "full", torch.float32)
    whole = whole_state(written, read_manifest(written), bare, ADAMW, folder)
    write_checkpoint(folder / "checkpoint", sharding_runs.contents_of(whole.model, whole.state, model))
    return folder / "checkpoint"


@pytest.mark.parametrize(("size", "recomputed"), [(4, True), (3, False)])
def test_two_ranks_and_then_others_give_the_bits_of_one_device(
    model: Path, written: Path, committed: Path, tmp_path: Path, size: int, recomputed: bool
) -> None:
    """Two steps on two ranks, then two on others, with four parts: weights, moments, losses and norms of one device."""
    arguments = (model, range(2, 4), committed, tmp_path / "last", torch.float32, recomputed)
    assert [0] * size == call_on_ranks(sharding_runs.in_group, size, sharding_runs.train_in_shards, *arguments)
    state, told = sharding_runs.on_one_device(model, "full", 4)
    first, last = (json.loads(path.with_suffix(".json").read_text()) for path in (written, tmp_path / "last"))
    assert told == first + last
    manifest = read_manifest(tmp_path / "last")
    whole = whole_state(tmp_path / "last", manifest, state.model, ADAMW, tmp_path)
    assert state.view().digest() == whole.state.digest()
    assert sharding_runs.measured_on_one_device(state) == json.loads((tmp_path / "last.measured").read_text())
    assert (size, 4, 4) == (manifest.ranks, manifest.count, whole.state.counters.step)


def test_the_trainer_takes_the_same_steps_in_shards(model: Path, tmp_path: Path) -> None:
    """The trainer of every run, with shares of several parts: losses, norms and state are those of one device, also at
    step 0, though the base is stored in bfloat16, and what is frozen stays as it was."""
    base = tmp_path / "base"
    shutil.copytree(model, base)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(base)
    model = base
    config = sharding_runs.file_config(model)
    state = TrainState.start(build_model(ModelSpec(config, model, CPU, torch.float32)), config)
    start, trained = state.snapshot(), {*state.parameters}
    told = sharding_runs.take_steps(Trainer(state, config, Execution(SingleProcess(CPU), torch.float32)))
    assert [0, 0] == call_on_ranks(sharding_runs.train_file, 2, model, tmp_path / "file")
    assert [told] * 2 == [json.loads((tmp_path / f"file.{rank}").read_text()) for rank in range(2)]
    whole = whole_state(tmp_path / "file", read_manifest(tmp_path / "file"), state.model, ADAMW, tmp_path)
    assert state.view().digest() == whole.state.digest()
    assert state.view().plain() == whole.state.plain()
    assert trained == {name for name, weight in whole.model.named_parameters() if weight.requires_grad}
    for (name, expected), (same, actual) in zip(
        state.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(expected, actual)
    assert state.view().size == whole.state.size
    first = tmp_path / "file.start"
    (tmp_path / "scratch").mkdir()
    new = whole_state(first, read_manifest(first), state.model, ADAMW, tmp_path / "scratch").state
    assert (start.digest(), {}) == (new.digest(), new.optimizer["state"])


def test_files_of_shards_have_a_size(written: Path) -> None:
    """Tensors share a file up to a size, which only one that is larger passes; no two neighbours could be one file."""
    tensors = read_manifest(written).tensors
    sizes: list[int] = []
    for path in sorted(written.glob("shard-00001-*")):
        with safe_open(path, "pt") as opened:  # type: ignore[no-untyped-call]
            own = [math.prod(tensors[key][0]) * 4 for key in opened.keys()]  # noqa: SIM118
        assert 1 == len(own) or sum(own) <= sharding_runs.FILE_BYTES
        sizes.append(sum(own))
    assert len(sizes) > 2
    assert all(one + next_one > sharding_runs.FILE_BYTES for one, next_one in itertools.pairwise(sizes))


@pytest.mark.parametrize("family", ["experts", "padded"])
def test_other_families_have_the_bits_of_one_device(family: str, tmp_path: Path) -> None:
    """A mixture of experts, and a model whose rows are padded, with an odd width of its layers."""
    tokenizer = tiny.byte_tokenizer()
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "intermediate_size": 49}
    experts = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    made = (
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, head_dim=8))
        if family == "experts"
        else GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    )
    base = tmp_path / "base"
    made.save_pretrained(base)
    tokenizer.save_pretrained(base)
    arguments = (base, range(2), None, tmp_path / "two", torch.float32, True)
    assert [0, 0] == call_on_ranks(sharding_runs.in_group, 2, sharding_runs.train_in_shards, *arguments)
    state, told = sharding_runs.on_one_device(base, "full", 2)
    assert told == json.loads((tmp_path / "two.json").read_text())
    assert sharding_runs.measured_on_one_device(state) == json.loads((tmp_path / "two.measured").read_text())


def test_half_precision_gives_the_bits_of_one_device(model: Path, tmp_path: Path) -> None:
    """Weights in float32, computed in bfloat16 by autocast, layers computed again in the backward pass."""
    arguments = (model, range(2), None, tmp_path / "half", torch.bfloat16, True)
    assert [0, 0] == call_on_ranks(sharding_runs.in_group, 2, sharding_runs.train_in_shards, *arguments)
    state, told = sharding_runs.on_one_device(model, "full", 2, torch.bfloat16)
    whole = whole_state(tmp_path / "half", read_manifest(tmp_path / "half"), state.model, ADAMW, tmp_path)
    assert told == json.loads((tmp_path / "half.json").read_text())
    assert state.view().digest() == whole.state.digest()


def test_adapters_beside_a_base_in_shards(model: Path, tmp_path: Path) -> None:
    """The frozen base lies in shards, the adapter whole on every rank: weights, moments, losses, norms are the same."""
    arguments = (model, 2, tmp_path / "adapter")
    assert [0, 0] == call_on_ranks(sharding_runs.in_group, 2, sharding_runs.train_beside_shards, *arguments)
    state, told = sharding_runs.on_one_device(model, "lora", 2)
    expected = [*sharding_runs.measured_on_one_device(state), told]
    assert [expected, expected] == [json.loads((tmp_path / f"adapter.{rank}").read_text()) for rank in range(2)]


def test_a_checkpoint_is_made_of_shards_and_cut_again(model: Path, written: Path, tmp_path: Path) -> None:
    """What is written of shards is what one device writes, file by file; it loads into shards on another number."""
    state, _ = sharding_runs.on_one_device(model, "full", 2)
    whole = whole_state(written, read_manifest(written), state.model, ADAMW, tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    manifests = [
        write_checkpoint(folder, sharding_runs.contents_of(source, saved, model))
        for folder, source, saved in ((one, state.model, state.view()), (other, whole.model, whole.state))
    ]
    assert manifests[0].parameters == manifests[1].parameters
    assert manifests[0].measurement == manifests[1].measurement
    apart = {MANIFEST_OF_CHECKPOINT, OPTIMIZER}  # how tensors lie in an optimizer.pt is not what is in it
    expected, actual = files_of(one), files_of(other)
    assert {name: expected[name] for name in expected.keys() - apart} == {
        name: actual[name] for name in actual.keys() - apart
    }
    loaded = TrainState.start(state.model, sharding_runs.config_of(model, "full"))
    load_moments(loaded, other / OPTIMIZER)
    assert state.view().digest() == loaded.view().digest()
    (tmp_path / f"{TEMPORARY_PREFIX}again").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}again" / "torn").touch()  # by a write that was killed
    assert [0] * 3 == call_on_ranks(
        sharding_runs.in_group, 3, sharding_runs.cut_checkpoint, model, other, tmp_path / "again"
    )
    assert not (tmp_path / "again" / "torn").exists()
    again = whole_state(tmp_path / "again", read_manifest(tmp_path / "again"), state.model, ADAMW, tmp_path)
    assert state.view().digest() == again.state.digest()
    assert whole.state.plain() == again.state.plain()


def test_a_rank_that_dies_leaves_no_state(model: Path, written: Path, tmp_path: Path) -> None:
    """A rank is killed while shards are written: the others end with an error, nothing appears, and what was stays."""
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    assert [1, -9] == call_on_ranks(sharding_runs.in_group, 2, sharding_runs.lose_a_rank, model, tmp_path / "torn")
    assert not (tmp_path / "torn").exists()
    assert before == {path.name: path.read_bytes() for path in written.iterdir()}
    require_files(written, read_manifest(written))


def test_a_rank_that_fails_inside_a_layer_ends_all(model: Path, tmp_path: Path) -> None:
    """The others wait for it inside of a layer: each rank ends with an error, the one that failed says why."""
    assert [1, 1] == call_on_ranks(sharding_runs.in_group, 2, sharding_runs.fail_in_a_layer, model, tmp_path / "told")
    told = [(tmp_path / f"told.{rank}").read_text() for rank in range(2)]
    assert told[0].startswith("rank 0 failed while all ranks computed together")
    assert "rank 1 failed while all ranks computed together: a cable was pulled" == told[1]


def test_ranks_of_different_steps_write_nothing(model: Path, tmp_path: Path) -> None:
    """All of them are told so, and nothing is left."""
    assert [0, 0] == call_on_ranks(
        sharding_runs.in_group, 2, sharding_runs.write_apart, model, tmp_path / "apart", tmp_path / "met"
    )
    assert {"met.0", "met.1"} == {path.name for path in tmp_path.iterdir()}
    assert {"the ranks have states of different steps"} == {path.read_text() for path in tmp_path.iterdir()}


def test_weights_are_whole_only_while_they_are_needed(model: Path, tmp_path: Path) -> None:
    """Those of a layer while it computes, those around the layers up to the end of the backward pass, if there is one;
    autocast keeps no copies of them meanwhile, and is then as it was."""
    assert [0, 0] == call_on_ranks(
        sharding_runs.in_group, 2, sharding_runs.say_where_weights_lie, model, tmp_path / "told"
    )
    sharded = [True, True, True]
    expected = {
        "before": sharded, "in a look": [True, False, False], "after a look": sharded, "after a failure": sharded,
        "before the backward pass": [True, False, True], "after it": sharded,
    }  # fmt: skip
    assert [expected] * 2 == [json.loads((tmp_path / f"told.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("place", ["full", "file/below"])
def test_a_disk_that_fails_one_rank_fails_all(model: Path, tmp_path: Path, place: str) -> None:
    """A rank cannot write its shards, or rank 0 cannot make the folder: all meet the same error, nothing is left."""
    (tmp_path / "file").touch()
    assert [0, 0] == call_on_ranks(
        sharding_runs.in_group, 2, sharding_runs.fill_a_disk, model, tmp_path / place, tmp_path / "met"
    )
    met = [int((tmp_path / f"met.{rank}").read_text()) for rank in range(2)]
    assert [errno.EFBIG if place == "full" else errno.ENOTDIR] * 2 == met
    assert {"file", "met.0", "met.1"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        ("changed", "changed (its hash differs)"), ("shorter", "changed (its hash differs)"), ("gone", "is missing"),
        ("unreadable", "it cannot be read"), ("changed manifest", "the manifest of the shards was changed"),
        ("shorter manifest", "this is not a manifest of shards"), ("gone manifest", "writing them did not finish"),
        ("longer manifest", "this is not a manifest of shards"), ("unreadable manifest", "it cannot be read"),
        ("later manifest", "the manifest of the shards was changed"),
    ],
)  # fmt: skip
def test_damaged_shards_are_refused(written: Path, tmp_path: Path, harm: str, what: str) -> None:
    """A file or a manifest that is missing or differs is reported by name; one that cannot be read is not damaged."""
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    victim = folder / MANIFEST if "manifest" in harm else sorted(folder.glob("*.safetensors"))[1]
    data = victim.read_bytes()
    victim.unlink()
    if "unreadable" in harm:
        victim.mkdir()  # which the system refuses to read, to root too
    elif "later" in harm:
        later = read_manifest(written).model_copy(update={"format": FORMAT + 1}).sealed()
        victim.write_bytes(later.model_dump_json().encode())
    elif "longer" in harm:
        victim.write_bytes(data.replace(b"{", b'{"another":1,', 1))
    elif "gone" not in harm:
        victim.write_bytes(data[:-2] if "shorter" in harm else data.replace(b"1", b"2", 1))
    with pytest.raises(Unreadable if "unreadable" in harm else DamagedState, match=re.escape(what)) as refusal:
        require_files(folder, read_manifest(folder))
    assert str(victim) == refusal.value.where


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
            one_by_one, here = total - total % width, end - (end - start) % width  # from these places on
            assert max(first, min(last, one_by_one)) == max(first, min(last, here))
    assert total == seen
