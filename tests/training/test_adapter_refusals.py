"""Adapters that cannot be saved, loaded back or trained as asked are refused; those of old runs stay as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import processes
import pytest
import small
import tiny
import torch
from peft import LoraConfig, get_peft_model
from runs import new_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from onward import Run
from onward.config import Config
from onward.errors import ConfigError, ModelError, OnwardError, VerificationFailed
from onward.training.checkpoints.checkpoint import write_checkpoint
from onward.training.model.roundtrip import prove_roundtrip
from onward.training.model.start_adapter import require_fits_base


@pytest.mark.slow
def test_dropout_that_experts_cannot_have_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    """`lora.dropout` set while a process trains a model whose `all-linear` covers stacked experts is refused at the
    next file: it had no effect on them, and what was saved could not be loaded again."""
    small.small_model("deepseek_v2").save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    run = new_run(tmp_path / "run", tmp_path / "model", batch_size=4, max_length=96, anchor={"rows": 0})
    given = run.layout.config.read_text()
    asked = given.replace("dropout: 0.0", "dropout: 0.1")
    assert asked != given
    files = [tiny.write_jsonl(tmp_path / f"{seed}.jsonl", tiny.chat_rows(3, seed=seed)) for seed in (1, 2)]
    with pytest.raises(ConfigError, match="experts that are stored as one tensor cannot have dropout"):
        run.train(*files, observe=lambda _: run.layout.config.write_text(asked))
    with pytest.raises(ModelError, match="does not work with lora_dropout") as refused:
        Run(run.layout.root).train()
    assert ("lora.dropout", "Set lora.dropout: 0 in onward.yaml.") == (refused.value.where, refused.value.hint)
    run.layout.config.write_text(given)
    assert ["2.jsonl"] == [file["name"] for file in Run(run.layout.root).train()]


DAMAGE: list[Callable[[dict[str, torch.Tensor]], object]] = [
    lambda tensors: tensors.pop(min(tensors)),
    lambda tensors: tensors.update({"base_model.model.score.weight": torch.zeros(1)}),
    lambda tensors: tensors.update({min(tensors): tensors[min(tensors)][:1].clone()}),
    lambda tensors: tensors[min(tensors)].add_(1),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=["missing", "unexpected", "shape", "value"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_does_not_load_back_is_refused(
    method: str, damage: Callable[[dict[str, torch.Tensor]], object], model: Path, tmp_path: Path
) -> None:
    """A weight that the stock library misses, does not expect, or finds with another shape or value is an error."""
    from safetensors.torch import load_file, save_file

    contents = checkpoints.make_contents(model, method=method)
    write_checkpoint(tmp_path / "checkpoint-1", contents)
    prove_roundtrip(contents.model, tmp_path / "checkpoint-1")
    file = next((tmp_path / "checkpoint-1").glob("*.safetensors"))
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match="does not load back"):
        prove_roundtrip(contents.model, tmp_path / "checkpoint-1")


def test_identity_keys_of_this_release_are_locked_in_old_runs(tmp_path: Path, model: Path) -> None:
    """A run whose identity was locked without a later key goes on with its default, and is refused another value."""
    run = Run.create(tmp_path / "run", str(model), batch_size=4)
    run.train(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(3)))
    text = run.layout.config.read_text()
    assert "lora.use_dora" not in json.dumps(run.config.identity())
    run.layout.config.write_text(text.replace("use_dora: false", "use_dora: true"))
    with pytest.raises(ConfigError, match=r"lora\.use_dora: the run has False, the config says True"):
        Run(run.layout.root).train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(3, seed=1)))


@pytest.mark.parametrize(
    "settings",
    [{"lora": {"rank": 2, "use_dora": True, "trainable_tokens": [3, 5]}}, {"method": "full", "train": ["layers.1."]}],
    ids=["lora", "full"],
)
def test_files_one_by_one_are_one_run(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Two files trained one by one, in processes of their own too, give the bits of two trained at once."""
    files = [tiny.write_jsonl(tmp_path / f"{seed}.jsonl", tiny.chat_rows(5, seed=seed)) for seed in (1, 2)]
    runs = [new_run(tmp_path / name, model, batch_size=2, **settings) for name in ("one", "two")]
    runs[0].train(*files)
    for file in files:
        if "lora" in settings:
            assert 0 == processes.train(runs[1].layout.root, [file])
        else:
            Run(runs[1].layout.root).train(file)
    kept = [checkpoints.files_of(run.layout.checkpoints()[0]) for run in runs]
    names = [name for name in kept[0] if name.endswith((".safetensors", "optimizer.pt", "_config.json"))]
    assert [] == [name for name in names if kept[0][name] != kept[1][name]]
    assert runs[1].verify(deep=True).ok


def test_an_adapter_of_nothing_is_refused() -> None:
    """Settings that exclude one another are refused when the config is read."""
    for lora in ({"targets": []}, {"target_parameters": ["w"]}, {"init": "orthogonal", "rank": 3}):
        with pytest.raises(ValueError, match=r"lora\."):
            Config.model_validate({"lora": lora})
    for values in ({"train": ["x"]}, {"method": "full", "train": ["("]}, {"tokens": ["a", "a"]}):
        with pytest.raises(ValueError, match=r"train|tokens"):
            Config.model_validate(values)
    assert issubclass(ConfigError, OnwardError)


def test_adapters_of_single_experts_are_refused_with_the_way_on(tmp_path: Path) -> None:
    """Transformers before 5 has a module for each expert, and its adapters do; the command that merges one is named."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    small.small_model("olmoe").save_pretrained(base)
    whole = AutoModelForCausalLM.from_pretrained(base)
    shape = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], base_model_name_or_path=str(base))
    get_peft_model(whole, shape).save_pretrained(folder)
    require_fits_base(folder, base)
    tensors = load_file(folder / "adapter_model.safetensors")
    of_expert = {
        name.replace("self_attn.q_proj", "mlp.experts.3.up_proj"): tensor.clone() for name, tensor in tensors.items()
    }
    save_file({**tensors, **of_expert}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="do not fit its config") as refused:
        require_fits_base(folder, base)
    assert "in an environment with 'transformers<5' and PEFT: python -c " in str(refused.value.hint)
    assert str(folder) in str(refused.value.hint)
