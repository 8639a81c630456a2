"""The admission: what is proven of a model before a run is made of it, and what is refused with which way out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from onward import Run
from onward.config import Config
from onward.errors import ConfigError, ModelError
from onward.training.admission.admit import admit
from onward.training.admission.findings import Findings
from onward.training.admission.longer import causal_length, compare_filled
from onward.training.admission.reach import without_gradient
from onward.training.admission.remedies import working_config
from onward.training.admission.small.narrow import still
from onward.training.model.adapter import named_targets
from onward.training.model.spec import ModelSpec

CPU = torch.device("cpu")
VOCABULARY = range(small.VOCABULARY)


def save(folder: Path, family: str, **settings: Any) -> Path:
    """Save a small model of a family with a tokenizer."""
    small.small_model(family, **settings).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def config(folder: Path, **settings: Any) -> Config:
    """Return a config for a model."""
    return Config.model_validate({"model": str(folder), "max_length": 64, **settings})


def prove(folder: Path, family: str, **settings: Any) -> Findings:
    """Return what the admission of a small model of a family finds, with the default settings."""
    return admit(ModelSpec(config(save(folder, family, **settings)), folder, CPU, torch.float32))


LAID: dict[str, dict[str, Any]] = {"gemma3_text": {}, "olmoe": {}, "gpt2": {}, "granite": {"logits_scaling": 8.0}}
"""Families whose rows may lie end to end: layers with and without a window; experts; positions; scaled logits."""
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_mamba": ("its own implementation", {}),
    "lfm2": ("different gradients", {"layer_types": ["conv", "full_attention"]}),
    "gemma2": ("its attention is", {}),
}
"""Families whose rows may not, and why: capped scores, states, convolutions, distances as scores."""


@pytest.mark.parametrize("family", LAID)
def test_rows_lie_end_to_end_where_that_is_proven(family: str, tmp_path: Path) -> None:
    """Loss and gradients of such a step are those of single rows in plain transformers, to float32 rounding."""
    found = prove_working(tmp_path, family, **LAID[family])
    assert ("end to end", "") == (found.rows, found.why_padded)
    assert found.difference < 1e-5


@pytest.mark.parametrize(
    "kind",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
         "original_max_position_embeddings": 64},
    ],
    ids=lambda kind: kind["rope_type"],
)  # fmt: skip
def test_angles_that_depend_on_the_row_are_proven_on_both_sides(kind: dict[str, Any], tmp_path: Path) -> None:
    """Original lengths are brought down for the proof, so that its rows lie below and beyond them."""
    found = prove(tmp_path, "llama", rope_parameters={"rope_theta": 100.0, **kind})
    assert "end to end" == found.rows
    assert found.difference < 1e-5


@pytest.mark.parametrize("family", PADDED)
def test_rows_are_padded_where_they_would_mix(family: str, tmp_path: Path) -> None:
    """What lies outside the attention of single rows speaks against laying them end to end, and is said."""
    why, settings = PADDED[family]
    found = prove_working(tmp_path, family, **settings)
    assert "padded" == found.rows
    assert why in found.why_padded
    assert found.difference < 1e-5


def test_positions_that_half_precision_would_hide(tmp_path: Path) -> None:
    """Where a model counts positions itself, wrong ones change less than bfloat16 rounds: float32 decides."""
    asked = config(save(tmp_path, "blenderbot-small"))
    found = admit(ModelSpec(asked, tmp_path, CPU, torch.bfloat16))
    assert "padded" == found.rows
    assert "different gradients" in found.why_padded


def test_dropout_that_a_model_asks_its_config_for(tmp_path: Path) -> None:
    """Two ways to compute a row compare without dropout, wherever a model keeps it; the config has it again after."""
    settings = {"hidden_dropout": 0.1, "attention_dropout": 0.2}
    model = small.small_model("falcon", **settings).train()
    kept = {key: getattr(model.config, key) for key in settings}
    with still(model):
        assert dict.fromkeys(settings, 0.0) == {key: getattr(model.config, key) for key in settings}
    assert kept == {key: getattr(model.config, key) for key in settings} == settings
    assert prove(tmp_path, "falcon", **settings).difference < 1e-5


def prove_working(folder: Path, family: str, **settings: Any) -> Findings:
    """Return what the admission finds with the settings that work."""
    targets = ["in_proj"] if "mamba" in family else "all-linear"
    asked = config(save(folder, family, **settings), lora={"targets": targets})
    working, _ = working_config(asked, folder, False)
    return admit(ModelSpec(working, folder, CPU, torch.float32))


@pytest.mark.parametrize("family", ["bert"])
def test_a_model_that_looks_ahead_is_refused(family: str, tmp_path: Path) -> None:
    """An encoder is refused with the key of its config that makes it causal, which was tried; with it, it passes."""
    with pytest.raises(ModelError, match="looks ahead") as refused:
        prove(tmp_path, family)
    assert '"is_decoder": true' in str(refused.value.hint)
    assert "end to end" == prove(tmp_path / "causal", family, is_decoder=True).rows


def test_a_model_that_always_looks_ahead_has_no_such_key(tmp_path: Path) -> None:
    """XLM attends both ways whatever its config says, so the refusal proposes no key."""
    with pytest.raises(ModelError, match="looks ahead") as refused:
        prove(tmp_path, "xlm")
    assert "is_decoder" not in str(refused.value.hint)


@pytest.mark.parametrize(("family", "limit"), [("gpt2", 512), ("codegen", 512), ("mpt", 512)])
def test_rows_beyond_the_positions_of_a_model_are_refused(family: str, limit: int, tmp_path: Path) -> None:
    """Tables that are weights, buffers or made on the way limit a row all the same."""
    asked = config(save(tmp_path, family), max_length=limit + 1)
    with pytest.raises(ModelError, match=f"{limit} positions") as refused:
        admit(ModelSpec(asked, tmp_path, CPU, torch.float32))
    assert f"--set max_length={limit}" in str(refused.value.hint)


def test_rotary_positions_have_no_end(tmp_path: Path) -> None:
    """A model that turns its positions takes rows beyond the length that its config states."""
    asked = config(save(tmp_path, "llama"), max_length=700)
    assert "end to end" == admit(ModelSpec(asked, tmp_path, CPU, torch.float32)).rows


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


def test_rows_are_not_filled_up_where_that_changes_them(tmp_path: Path) -> None:
    """Attention that chooses tokens may choose others in a filled up row; such rows go with those of their length."""
    folder = save(tmp_path, "glm_moe_dsa")
    for max_length, laid in ((16, "padded"), (64, "by length")):
        asked = config(folder, method="full", max_length=max_length)
        found = admit(ModelSpec(asked, folder, CPU, torch.float32))
        assert (laid, laid == "by length") == (found.rows, found.treatment.by_length)
        assert found == Findings.of(json.loads(json.dumps(found.to_dict())))
    assert any(
        line.startswith("rows are computed together with rows of equal length: padded") for line in found.lines()
    )


class MixesRows(nn.Module):
    """Lets the rows of a step change each other, unless one of them is alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer returns; of several rows with their mean."""
        out = self.inner(x)
        return out + out.mean(dim=0, keepdim=True) if len(x) > 1 else out


@pytest.mark.parametrize("max_length", [16, 64])
def test_filling_that_changes_short_rows_too(max_length: int, tmp_path: Path) -> None:
    """ProphetNet counts places by the length of all rows: they are computed with those of their own length."""
    asked = config(save(tmp_path, "prophetnet"), method="full", max_length=max_length)
    found = admit(ModelSpec(asked, tmp_path, CPU, torch.float32))
    assert ("by length", True) == (found.rows, found.treatment.by_length)
    assert "padded, rows have different gradients" in found.why_padded
    assert found.difference < 1e-5


def test_rows_of_one_length_that_change_each_other_are_seen(tmp_path: Path) -> None:
    """A step by length has two rows of one length, so that what they do to each other shows."""
    folder = save(tmp_path, "llama")
    spec = ModelSpec(config(folder, method="full"), folder, CPU, torch.float32)
    model: Any = LlamaForCausalLM.from_pretrained(folder).train()
    assert compare_filled(spec, model, VOCABULARY, by_length=True).largest < 1e-5
    model.model.layers[0].mlp.down_proj = MixesRows(model.model.layers[0].mlp.down_proj)
    assert compare_filled(spec, model, VOCABULARY, by_length=True).largest > 1e-2


class LooksAheadInLongRows(LlamaForCausalLM):
    """A model whose logits depend on all tokens of a row, where it has more than 40."""

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        """Return logits as the model does."""
        outputs = super().forward(input_ids=input_ids, **more)
        if input_ids.shape[1] > 40:
            outputs.logits = outputs.logits + outputs.logits.mean(dim=1, keepdim=True)
        return outputs


def test_a_model_that_looks_ahead_in_long_rows_only(tmp_path: Path) -> None:
    """The number of tokens is found up to which it does not."""
    folder = save(tmp_path, "llama")
    spec = ModelSpec(config(folder), folder, CPU, torch.float32)
    model = LooksAheadInLongRows.from_pretrained(folder)
    assert 40 == causal_length(spec, model, VOCABULARY)
    assert causal_length(spec, LlamaForCausalLM.from_pretrained(folder), VOCABULARY) is None


def test_an_adapter_that_peft_does_not_load_back_is_left_out(tmp_path: Path) -> None:
    """Transformers renames Laguna's shared experts when it loads them, and PEFT then drops their adapters."""
    assert {"gate_proj", "up_proj", "down_proj"} == {
        name.partition(".shared_experts.")[2] for name in prove(tmp_path, "laguna").left_out
    }


def test_looking_ahead_is_seen_in_any_compute_type(tmp_path: Path) -> None:
    """What a token changes before it may be little, so it is looked for in float32; the weights stay as they are."""
    save(tmp_path, "bert")
    with pytest.raises(ModelError, match="looks ahead"):
        admit(ModelSpec(config(tmp_path), tmp_path, CPU, torch.bfloat16))


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


def test_a_whole_model_that_fails_in_bfloat16_alone(tmp_path: Path) -> None:
    """The refusal says that it works in float32: DBRX adds what autocast multiplied to what it did not."""
    folder = save(tmp_path, "dbrx")
    given = config(folder, method="full", dtype="bfloat16")
    with pytest.raises(ModelError, match="computes no loss") as refused:
        admit(ModelSpec(given, folder, CPU, torch.bfloat16))
    assert "In float32 it works: --set dtype=float32" == refused.value.hint


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
