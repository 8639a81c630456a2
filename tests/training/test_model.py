"""One builder makes full, LoRA and quantized LoRA models."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import stock
import tiny
import torch

from onward import Run
from onward.config import Config
from onward.errors import ModelError
from onward.training.checkpoints.checkpoint import write_checkpoint
from onward.training.model.base import digest_base, find_here, resolve_base, with_stored_path
from onward.training.model.load import build_model, load_model
from onward.training.model.spec import ModelSpec

CPU = torch.device("cpu")


def config(model: Path, **settings: Any) -> Config:
    """Return a config for a model."""
    return Config.model_validate({"model": str(model), **settings})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_computes_and_float32_is_trained(method: str, model: Path, tmp_path: Path) -> None:
    """With `dtype: bfloat16` the trained weights and their files stay float32, and a replay gives the same bits."""
    run = Run.create(tmp_path / "run", str(model), method=method, dtype="bfloat16", batch_size=4, max_length=256)
    run.train(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(9)))
    built = build_model(ModelSpec(run.config, model, CPU, torch.bfloat16))
    assert {torch.float32} == {parameter.dtype for parameter in built.parameters() if parameter.requires_grad}
    assert run.verify(deep=True).ok


def test_adapter_is_a_function_of_the_seed(model: Path) -> None:
    """The same seed gives the same fresh adapter whatever the caller's random state; another seed another one."""
    weights: list[torch.Tensor] = []
    for seed, state in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(state)
        built = build_model(ModelSpec(config(model, seed=seed), model, CPU, torch.float32))
        assert torch.initial_seed() == state
        weights.append(next(value for name, value in built.named_parameters() if "lora_A" in name).detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_targets_that_do_not_exist_are_named(model: Path) -> None:
    """An adapter for modules that the model lacks is refused with those it has."""
    with pytest.raises(ModelError, match=r"Linear layers of this model: .*q_proj"):
        build_model(ModelSpec(config(model, lora={"targets": ["attention_query"]}), model, CPU, torch.float32))


def test_qlora_trains_where_bitsandbytes_is_there(tmp_path: Path) -> None:
    """Quantized LoRA trains and verifies where bitsandbytes is installed; elsewhere it is refused with the command."""
    base = tiny.save_tiny_model(tmp_path / "base", layers=2, hidden=64)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ModelError, match=r"onward\[qlora\]"):
            Run.create(tmp_path / "run", str(base), method="qlora")
        return
    run = Run.create(tmp_path / "run", str(base), method="qlora", batch_size=4, max_length=256)
    run.train(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(6)))
    assert run.verify(deep=True).ok


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_without_an_optimizer_is_that_of_the_checkpoint(method: str, model: Path, tmp_path: Path) -> None:
    """What chat, export and evaluation load is frozen, in evaluation mode, and computes what the trained model does."""
    contents = checkpoints.make_contents(model, method=method, steps=3)
    write_checkpoint(tmp_path / "checkpoint-3", contents)
    torch.manual_seed(5)
    loaded = load_model(tmp_path / "checkpoint-3", model, CPU, torch.float32)
    assert 5 == torch.initial_seed()
    assert not loaded.training
    assert [] == [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert torch.equal(stock.logits(contents.model), stock.logits(loaded))
    assert not torch.equal(
        stock.logits(build_model(ModelSpec(contents.config, model, CPU, torch.float32))), stock.logits(loaded)
    )
    half = load_model(tmp_path / "checkpoint-3", model, CPU, torch.bfloat16)
    assert {torch.bfloat16} == {parameter.dtype for parameter in half.parameters()}


def test_weights_in_another_folder_belong_to_a_base(model: Path, tmp_path: Path) -> None:
    """An index may name weights in folders of their own: the digest is of them, too. A damaged index names none."""
    folder = shutil.copytree(model, tmp_path / "model")
    plain = digest_base(folder)
    index, weights = folder / "model.safetensors.index.json", folder / "parts/model.safetensors"
    index.write_text("{")
    damaged = digest_base(folder)
    weights.parent.mkdir()
    (folder / "model.safetensors").rename(weights)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "parts/model.safetensors"}}))
    whole = digest_base(folder)
    weights.write_bytes(weights.read_bytes() + b" ")
    assert 4 == len({plain, damaged, whole, digest_base(folder)})


def test_a_base_inside_a_run_moves_with_it(model: Path, tmp_path: Path) -> None:
    """It is stored relative to the run and found there from any directory; one outside is stored whole."""
    root = tmp_path / "run"
    tiny.save_tiny_model(root / "base", layers=2)
    own = with_stored_path(config(root / "base"), resolve_base(str(root / "base")), root)
    assert "base" == own.model
    assert with_stored_path(own, resolve_base(own.model, root=root), root) == own
    root.rename(tmp_path / "moved")
    assert tmp_path / "moved" / "base" == resolve_base(own.model, root=tmp_path / "moved")
    assert find_here(own.model) is None
    other = with_stored_path(config(model), resolve_base(str(model)), root)
    assert str(model) == other.model == str(resolve_base(other.model, root=root))
    named = Config.model_validate({"model": "org/name"})
    assert named == with_stored_path(named, tmp_path / "cache" / "snapshot", root)
