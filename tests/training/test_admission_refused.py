"""The admission: folders that are no whole model are refused, with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from admitting import CPU, config, save
from safetensors.torch import load_file, save_file

from onward import Run
from onward.errors import ModelError
from onward.training.admission.admit import admit
from onward.training.admission.findings import Findings
from onward.training.model.spec import ModelSpec


def test_files_that_are_torn_gone_or_of_a_later_release(tmp_path: Path) -> None:
    """What transformers cannot load is refused with what to do about it."""
    weights, kept = save(tmp_path, "llama") / "model.safetensors", tmp_path / "config.json"
    whole, known = weights.read_bytes(), kept.read_text()
    weights.write_bytes(whole[:5000])
    with pytest.raises(ModelError, match="cannot be loaded") as torn:
        admit(ModelSpec(config(tmp_path), tmp_path, CPU, torch.float32))
    assert "copy or download the whole folder again" in str(torn.value.hint)
    weights.write_bytes(whole)
    kept.write_text(known.replace('"model_type": "llama"', '"model_type": "llama9"'))
    with pytest.raises(ModelError, match="llama9") as later:
        admit(ModelSpec(config(tmp_path), tmp_path, CPU, torch.float32))
    assert "The installed transformers is " in str(later.value.hint)


def without(folder: Path, *names: str, **others: torch.Tensor) -> None:
    """Take weights out of a model's file, and put others in."""
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in names}
    save_file({**tensors, **others}, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "head": (lambda folder: without(folder, "lm_head.weight"), r"1 weight is missing .*lm_head\.weight"),
    "layer": (
        lambda folder: without(folder, *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))),
        r"3 weights are missing .*layers\.1\.mlp",
    ),
    "shape": (
        lambda folder: without(folder, **{"model.norm.weight": torch.ones(7)}),
        r"not of the shape that config\.json says, model\.norm\.weight first: \[7\] in the files",
    ),
    "more": (
        lambda folder: without(folder, **{"value_head.weight": torch.ones(7)}),
        r"no place for: value_head\.weight",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_weights_that_are_not_the_models_are_refused_by_name(what: str, tmp_path: Path) -> None:
    """Missing ones would be random, other shapes and others too many mean another model; nothing is made."""
    folder = save(tmp_path / "model", "llama", tie_word_embeddings=False)
    break_it, words = BROKEN[what]
    break_it(folder)
    with pytest.raises(ModelError, match=words):
        Run.create(tmp_path / "run", str(folder))
    assert not (tmp_path / "run").exists()


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    """A head that is the embedding is in the file once."""
    folder = save(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert "end to end" == admit(ModelSpec(config(folder), folder, CPU, torch.float32)).rows


@pytest.mark.parametrize(
    ("values", "words", "remedy"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)", "method=qlora"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "8 bits", "method=qlora"),
        ({"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}, "its own code", "-hf"),
    ],
)
def test_models_that_need_more_are_named(values: dict[str, Any], words: str, remedy: str, tmp_path: Path) -> None:
    """Quantized weights, but for those of `qlora`, and code of the folder's own are refused, each with its way on."""
    folder = save(tmp_path / "model", "llama")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    for method in ("lora", "qlora"):
        with pytest.raises(ModelError, match=words) as refused:
            Run.create(tmp_path / "run", str(folder), method=method)
        assert remedy in str(refused.value.hint)


@pytest.mark.parametrize("beside_a_model", [True, False])
def test_an_adapter_is_named_as_one(beside_a_model: bool, tmp_path: Path) -> None:
    """The way on is its base and `--adapter`; transformers would put it on the model alongside it without a word."""
    folder = save(tmp_path / "model", "llama") if beside_a_model else tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ModelError, match="contains an adapter") as refused:
        Run.create(tmp_path / "run", str(folder))
    assert f"--model org/base --adapter {folder}" in str(refused.value.hint)


def test_tokens_that_every_chat_has_lie_within_the_embedding(tmp_path: Path) -> None:
    """A model whose embedding is smaller than its template's tokens is refused when the run is made."""
    small.small_model("llama", vocab_size=257).save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"the model's embedding has 257 rows"):
        Run.create(tmp_path / "run", str(tmp_path / "model"))


def test_a_run_that_has_trained_is_warned_only(tmp_path: Path) -> None:
    """What refuses a new run is kept as a warning for an old one, which goes on as it did."""
    found = admit(ModelSpec(config(save(tmp_path, "bert")), tmp_path, CPU, torch.float32), strict=False)
    assert ("padded", ()) == (found.rows, found.left_out)
    assert any("looks ahead" in warning for warning in found.warnings)
    assert any(line.startswith("a new run would be refused: the model looks ahead") for line in found.lines())
    assert found == Findings.of(json.loads(json.dumps(found.to_dict())))
