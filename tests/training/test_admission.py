"""The admission: what is proven of a model before a run is made of it, and what is refused with which way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from admitting import CPU, config, prove, save
from torch import nn
from transformers import LlamaForCausalLM

from onward.errors import ModelError
from onward.training.admission.admit import admit
from onward.training.admission.findings import Findings
from onward.training.admission.longer import causal_length, compare_filled
from onward.training.admission.remedies import working_config
from onward.training.admission.small.narrow import still
from onward.training.model.spec import ModelSpec

VOCABULARY = range(small.VOCABULARY)
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


def test_looking_ahead_is_seen_in_any_compute_type(tmp_path: Path) -> None:
    """What a token changes before it may be little, so it is looked for in float32; the weights stay as they are."""
    save(tmp_path, "bert")
    with pytest.raises(ModelError, match="looks ahead"):
        admit(ModelSpec(config(tmp_path), tmp_path, CPU, torch.bfloat16))


def test_a_whole_model_that_fails_in_bfloat16_alone(tmp_path: Path) -> None:
    """The refusal says that it works in float32: DBRX adds what autocast multiplied to what it did not."""
    folder = save(tmp_path, "dbrx")
    given = config(folder, method="full", dtype="bfloat16")
    with pytest.raises(ModelError, match="computes no loss") as refused:
        admit(ModelSpec(given, folder, CPU, torch.bfloat16))
    assert "In float32 it works: --set dtype=float32" == refused.value.hint
