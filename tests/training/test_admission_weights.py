"""The admission: which weights are trained, which are left out by name, and which targets are proposed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import tiny
import torch
from admitting import CPU, config, prove, save

from onward import Run
from onward.errors import ConfigError, ModelError
from onward.training.admission.admit import admit
from onward.training.admission.reach import without_gradient
from onward.training.admission.remedies import working_config
from onward.training.model.adapter import named_targets
from onward.training.model.spec import ModelSpec


def test_weights_without_a_gradient_are_left_out_by_name(tmp_path: Path) -> None:
    """Jamba reads the weight of `dt_proj` past its forward pass, so an adapter there would never learn anything."""
    found = prove(tmp_path, "jamba")
    assert {"dt_proj"} == {name.rpartition(".")[2] for name in found.left_out}
    assert any(line.endswith(": model.layers.*.mamba.dt_proj") for line in found.lines())
    assert () == admit(ModelSpec(config(tmp_path, method="full"), tmp_path, CPU, torch.float32)).left_out


def test_weights_that_only_longer_rows_reach_are_trained(tmp_path: Path) -> None:
    """What sums tokens up in blocks gets a gradient from rows of more than a block, if the run has such rows."""
    folder = save(tmp_path, "deepseek_v4")
    name = "model.layers.0.self_attn.compressor.kv_proj.weight"
    for max_length, is_left_out in ((64, True), (160, False)):
        asked = config(folder, method="full", max_length=max_length)
        assert is_left_out == (name in admit(ModelSpec(asked, folder, CPU, torch.float32)).left_out)


def test_an_adapter_that_peft_does_not_load_back_is_left_out(tmp_path: Path) -> None:
    """Transformers renames Laguna's shared experts when it loads them, and PEFT then drops their adapters."""
    assert {"gate_proj", "up_proj", "down_proj"} == {
        name.partition(".shared_experts.")[2] for name in prove(tmp_path, "laguna").left_out
    }


def test_an_embedding_that_is_trained_whole_on_a_bfloat16_base(tmp_path: Path) -> None:
    """The proof computes in the types of a step. Where PyTorch has no such layer norm on a CPU, the refusal says so."""
    for family, saved in (("llama", "embed_tokens"), ("gpt2", "wte")):
        folder = save(tmp_path / family, family)
        given = config(folder, dtype="bfloat16", lora={"modules_to_save": [saved]})
        refusal = contextlib.nullcontext() if family == "llama" else pytest.raises(ModelError)
        with refusal as refused:
            admit(ModelSpec(given, folder, CPU, torch.bfloat16))
        assert refused is None or refused.value.hint == "In float32 it works: --set dtype=float32"
    admit(ModelSpec(given, folder, CPU, torch.float32))


def test_the_vision_of_a_model_of_text_and_images_is_left_out(tmp_path: Path) -> None:
    """No row of text reaches it, whether an adapter or all weights are trained."""
    assert all(name.startswith("model.vision_tower.") for name in prove(tmp_path, "gemma3").left_out)
    whole = admit(ModelSpec(config(tmp_path, method="full"), tmp_path, CPU, torch.float32)).left_out
    assert whole
    assert [] == [name for name in whole if "language_model" in name]


def test_experts_without_an_adapter_are_named(tmp_path: Path) -> None:
    """`all-linear` skips stacked weights; the reported share excludes them."""
    found = prove(tmp_path, "gpt_oss")
    assert ("mlp.experts.gate_up_proj", "mlp.experts.down_proj") == found.unreached
    assert found.reach < 0.2
    assert 0.95 < prove(tmp_path / "llama", "llama").reach <= 1.0


def test_an_expert_without_tokens_is_not_left_out() -> None:
    """It gets no gradient in one step and may in another: an expert of the same layer got one."""
    names = [f"layers.{layer}.experts.{expert}.up.weight" for layer in (0, 1) for expert in (0, 1)]
    assert tuple(names[2:]) == without_gradient(names, {names[0]})
    assert ("layers.1.up.weight",) == without_gradient(
        ["layers.0.up.weight", "layers.1.up.weight"], {"layers.0.up.weight"}
    )


def test_the_default_dropout_gives_way_to_experts(tmp_path: Path) -> None:
    """PEFT drops nothing of what experts read: the run is made with dropout 0 and says so, or refuses a chosen one."""
    save(tmp_path / "model", "mixtral")
    told: list[str] = []
    run = Run.create(tmp_path / "run", str(tmp_path / "model"), report=told.append)
    assert 0.0 == run.config.lora.dropout
    assert any(line.startswith("lora.dropout is 0.0 in this run") for line in told)
    with pytest.raises(ConfigError, match="experts") as refused:
        Run.create(tmp_path / "other", str(tmp_path / "model"), lora={"dropout": 0.1})
    assert "--set lora.dropout=0" == refused.value.hint
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", ["opt", "biogpt"])
def test_a_step_may_leave_out_all_layers(family: str, tmp_path: Path) -> None:
    """LayerDrop draws which layers a step has; none of them is proven like others, and its weights are not left out."""
    assert () == prove(tmp_path, family, layerdrop=0.95).left_out


@pytest.mark.slow
def test_steps_without_layers_are_trained_and_repeat(tmp_path: Path) -> None:
    """Such a step changes weights by what the moments hold, counts as one, and a replay has the same bits."""
    save(tmp_path / "model", "opt", layerdrop=0.95)
    run = Run.create(tmp_path / "run", str(tmp_path / "model"), max_length=128, batch_size=2)
    run.train(tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(6)))
    assert run.verify(deep=True).ok


def test_targets_that_work_are_proposed(tmp_path: Path) -> None:
    """Where `all-linear` names layers that PEFT refuses, the refusal names those that it takes; with them it works."""
    asked = config(save(tmp_path, "mamba"))
    with pytest.raises(ConfigError) as refused:
        working_config(asked, tmp_path, False)
    assert "--set 'lora.targets=[dt_proj, in_proj, x_proj]'" in str(refused.value.hint)
    with_them = config(tmp_path, lora={"targets": ["dt_proj", "in_proj", "x_proj"]})
    assert {"dt_proj"} == {
        name.rpartition(".")[2] for name in admit(ModelSpec(with_them, tmp_path, CPU, torch.float32)).left_out
    }


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj v_proj", ["q_proj", "v_proj"]),
        ("self_attn.q_proj", ["self_attn.q_proj"]),
        ("all-linear", "all-linear"),
        (r".*layers\.[01]\..*q_proj", r".*layers\.[01]\..*q_proj"),
        ("(.*)(q|v)_proj", "(.*)(q|v)_proj"),
        (["q_proj"], ["q_proj"]),
    ],
)
def test_a_word_names_modules_and_all_else_is_an_expression(written: str | list[str], taken: str | list[str]) -> None:
    """PEFT holds text against whole names only, so `q_proj` would fit nothing."""
    assert taken == named_targets(written)


@pytest.mark.parametrize("targets", ["q_proj", r".*\.[qv]_proj"])
def test_targets_as_people_write_them(targets: str, tmp_path: Path, model: Path) -> None:
    """A word, some words and an expression all make an adapter."""
    found = admit(ModelSpec(config(model, lora={"targets": targets}), model, CPU, torch.float32))
    assert 0 < found.reach < 0.5
