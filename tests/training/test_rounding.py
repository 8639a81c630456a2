"""Rounding and faults where half precision hides which of them it is: tokens that go to another expert."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch

from onward.config import Config
from onward.data.plan.loader import Batch, FlatBatch, flatten
from onward.errors import ModelError
from onward.training.admission import rounding, together
from onward.training.admission.admit import admit
from onward.training.admission.findings import Findings
from onward.training.admission.gradients import TOLERANCE, Gradients, of_rows, of_step
from onward.training.admission.neighbours import influence
from onward.training.model.spec import ModelSpec

HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model in bfloat16."""
    folder = tmp_path_factory.mktemp("base")
    small.small_model("llama").to(HALF).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def prove(folder: Path) -> Findings:
    """Return what the admission of a model finds that computes in bfloat16."""
    config = Config.model_validate({"model": str(folder), "max_length": 64})
    return admit(ModelSpec(config, folder, torch.device("cpu"), HALF))


def change_one(monkeypatch: pytest.MonkeyPatch, dtypes: Collection[torch.dtype]) -> None:
    """Let steps in these types have one other gradient: the smallest, as where an expert gets another token."""

    def step(model: Any, batch: Batch, config: Config, device: torch.device, dtype: torch.dtype, **how: Any) -> Any:
        taken = of_step(model, batch, config, device, dtype, **how)
        if dtype not in dtypes:
            return taken
        name = min(taken.of, key=lambda name: float(taken.of[name].norm()))
        return replace(taken, of={**taken.of, name: 1.5 * taken.of[name]})

    monkeypatch.setattr(rounding, "of_step", step)


def test_a_gradient_that_only_half_precision_changes_is_rounding(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than rounding does where no expert is chosen; in float32 the same step has the gradients of its rows."""
    change_one(monkeypatch, [HALF])
    found = prove(base)
    assert ("end to end", "") == (found.rows, found.why_padded)
    assert TOLERANCE[HALF] < found.difference


def test_a_gradient_that_is_wrong_in_any_type_is_a_fault(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little it is among all gradients."""
    change_one(monkeypatch, [HALF, SINGLE])
    with pytest.raises(ModelError, match="the gradients of a step differ from those of its rows"):
        prove(base)


def one_sees_another(batch: Batch) -> FlatBatch:
    """Lay rows end to end with the first two as one."""
    flat = flatten(batch)
    return replace(flat, lengths=(flat.lengths[0] + flat.lengths[1], *flat.lengths[2:]))


def test_a_row_that_sees_another_in_half_precision_only(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that only half precision has may be at fault: what float32 computes is no proof of it."""

    def step(model: Any, batch: Batch, config: Config, device: torch.device, dtype: torch.dtype, **how: Any) -> Any:
        with pytest.MonkeyPatch.context() as changed:
            if dtype == HALF:
                changed.setattr("onward.training.steps.loss.flatten", one_sees_another)
            return of_step(model, batch, config, device, dtype, **how)

    monkeypatch.setattr(rounding, "of_step", step)
    found = prove(base)
    assert "padded" == found.rows
    assert "laid end to end, they have different gradients" in found.why_padded


@pytest.mark.parametrize("error", [RuntimeError("expected BFloat16"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_model_that_cannot_compute_in_float32(error: Exception, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then half precision alone decides, as it does where the model does not fit."""

    def fails(spec: ModelSpec, model: Any, batch: Batch) -> Gradients:
        if spec.dtype == SINGLE:
            raise error
        return of_rows(spec, model, batch)

    monkeypatch.setattr(rounding, "of_rows", fails)
    assert "end to end" == prove(base).rows
    change_one(monkeypatch, [HALF])
    with pytest.raises(ModelError, match="the gradients of a step differ from those of its rows"):
        prove(base)


@pytest.mark.parametrize(
    ("half", "single", "rows"),
    [(0.3, 1e-6, "end to end"), (0.3, 0.3, "padded"), (float("inf"), 0.0, "padded"), (0.05, 0.3, "end to end")],
)
def test_rows_that_change_each_other(
    half: float, single: float, rows: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where plain rows do so too, float32 tells whether it is rounding; where they do not, one bit is a fault."""

    def found(model: Any, batch: Batch, vocabulary: range, device: torch.device, dtype: torch.dtype) -> float:
        assert influence(model, batch, vocabulary, device, dtype) == 0.0
        return half if dtype == HALF else single

    monkeypatch.setattr(together, "influence", found)
    assert rows == prove(base).rows
