"""Every row is trained with the angles that plain transformers gives that row alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from rows import CPU, VOCABULARY, batch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from onward import Run
from onward.config import Config
from onward.data.plan.loader import Batch
from onward.training.layers.attention import PADDING_FREE, ROW_ATTENTION
from onward.training.layers.rope import Angles, angles_of
from onward.training.steps.loss import TargetLoss
from onward.training.steps.parts import Part, RowLayout, parts_of

ORIGINAL = 16
LENGTHS = (9, 30, ORIGINAL, ORIGINAL + 1, 30, 7)
"""On both sides of the original length, at it, and twice the same."""
LONG, SHORT = [4.0, 3.0, 2.0, 6.0], [1.0, 1.25, 1.5, 1.0]
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "long_factor": LONG, "short_factor": SHORT,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
}  # fmt: skip
DEPENDENT = ("dynamic", "longrope")
FAMILIES = ("llama", "phi3", "qwen2", "gemma3_text", "granite", "cohere", "stablelm", "olmo", "phimoe")
CASES = [
    *((family, kind) for family in ("llama", "granite") for kind in KINDS if kind not in DEPENDENT),
    *((family, kind) for family in FAMILIES for kind in DEPENDENT if (family, kind) != ("phi3", "dynamic")
      and (family, kind) != ("phimoe", "dynamic")),
    ("phimoe", "yarn"),
]  # fmt: skip
"""Kinds with constant angles for a model that takes rows end to end and for one that does not; the others for all that
have them. PhiMoE scales the angles of any kind by length."""


def make_model(family: str, kind: str) -> nn.Module:
    """Return a random model of two layers with RoPE of a kind; equal for equal arguments."""
    rope: dict[str, Any] = {"rope_theta": 100.0, "partial_rotary_factor": 1.0, **KINDS[kind]}
    if family == "phimoe" and kind != "default":
        rope |= {"long_mscale": 1.3, "short_mscale": 1.1}
    if family == "gemma3_text":  # each kind of layer has parameters of its own
        rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": rope}
    length = ORIGINAL if kind == "dynamic" else 64
    settings = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=length, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters=rope, original_max_position_embeddings=ORIGINAL, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    attention = ROW_ATTENTION if family in PADDING_FREE else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter that has one."""
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def in_parts(model: nn.Module, rows: Batch) -> float:
    """Add the gradients of a step's rows, cut as a step is, to the model's; return the loss."""
    loss = TargetLoss(model, CPU, torch.float32)
    parts = [loss(part.batch) for part in parts_of(rows, Config(), 0, loss.layout)]
    for part in parts:
        part.backward()
    loss.forget()
    return float(sum(part.detach() for part in parts))


def row_by_row(model: nn.Module, rows: Batch) -> float:
    """Add the gradients that plain transformers gives each row on a fresh model; return the loss."""
    total = 0.0
    for row in rows.rows:
        fresh: Any = copy.deepcopy(model)
        fresh.set_attn_implementation("sdpa")
        ids = torch.from_numpy(row.ids)
        logits = fresh(input_ids=ids[None], use_cache=False).logits[0, :-1]
        wanted = torch.from_numpy(row.targets)[1:]
        loss = functional.cross_entropy(logits[wanted].float(), ids[1:][wanted], reduction="sum")
        loss.backward()
        total += float(loss.detach())
        for name, gradient in gradients(fresh).items():
            weight = model.get_parameter(name)
            weight.grad = gradient.clone() if weight.grad is None else weight.grad + gradient
    return total


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_row_has_the_angles_that_it_has_alone(family: str, kind: str) -> None:
    """Loss and gradients of mixed steps are those of rows alone in a fresh model, after other lengths came before."""
    rows = batch(*LENGTHS)
    expected, model = make_model(family, kind), make_model(family, kind)
    loss = row_by_row(expected, rows)
    before = small.beside_weights(model)
    in_parts(model, batch(40, 3, seed=1))
    assert [] == small.changed_beside_weights(model, before)
    model.zero_grad()
    assert in_parts(model, rows) == pytest.approx(loss, rel=1e-5)
    assert gradients(expected).keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, gradients(expected)[name], rtol=1e-3, atol=2e-5, msg=lambda text, n=name: n + text
        )


@pytest.mark.parametrize("measure", ["scores", "logits"])
def test_what_a_row_scores_does_not_depend_on_rows_before_it(measure: str) -> None:
    """A model that keeps the angles of the longest row that it saw measures a shorter one as if it were the first."""
    loss = TargetLoss(make_model("llama", "dynamic"), CPU, torch.float32)

    def measured(length: int) -> list[torch.Tensor]:
        with torch.no_grad():
            found = getattr(loss, measure)(batch(length))
            return list(found) if measure == "scores" else [each for pair in found for each in pair]

    first = measured(ORIGINAL + 4)
    measured(2 * ORIGINAL)
    assert all(map(torch.equal, first, measured(ORIGINAL + 4)))


def test_angles_are_read_from_the_config() -> None:
    """Kinds whose angles depend on the length are found, also where each kind of layer has its own; others are not."""
    found = {kind: angles_of(model.config) for kind, model in models("llama")}
    assert {kind: Angles() for kind in KINDS if kind not in DEPENDENT} == {
        kind: angles for kind, angles in found.items() if angles.are_constant
    }
    assert Angles((ORIGINAL,)) == found["longrope"]
    assert Angles(own_beyond=ORIGINAL) == found["dynamic"]
    nested: Any = make_model("gemma3_text", "longrope").config
    assert Angles((ORIGINAL,)) == angles_of(nested)


def models(family: str) -> list[tuple[str, Any]]:
    """Return a model of each kind."""
    return [(kind, make_model(family, kind)) for kind in KINDS]


def test_regimes() -> None:
    """A row at a bound is short; beyond the length of a `dynamic` model every length is a regime of its own."""
    assert [(0, 0), (0, 0), (1, 0), (1, 0)] == [Angles((16,)).regime(length) for length in (2, 16, 17, 900)]
    assert [(0, 0), (0, 17), (0, 18)] == [Angles(own_beyond=16).regime(length) for length in (16, 17, 18)]


def test_parts_of_mixed_angles() -> None:
    """Rows of a part share a regime, in the order in which regimes occur; a step of one regime is cut as ever."""
    longrope, dynamic = RowLayout(angles=Angles((16,))), RowLayout(angles=Angles(own_beyond=16))
    rows = batch(9, 30, 16, 17, 30, 7)
    assert [[9, 16, 7], [30, 17, 30]] == lengths(parts_of(rows, Config(), 0, longrope))
    assert [[9, 16, 7], [30, 30], [17]] == lengths(parts_of(rows, Config(), 0, dynamic))
    halves = Config.model_validate({"gradient_accumulation": 2})
    assert [[9, 16, 7], [30, 17, 30]] == lengths(parts_of(rows, halves, 0, longrope))
    short = batch(9, 16, 7, 8)
    for config in (Config(), halves):
        plain = parts_of(short, config, 0)
        for layout in (longrope, dynamic):
            parts = parts_of(short, config, 0, layout)
            assert (lengths(plain), [part.seed for part in plain]) == (lengths(parts), [part.seed for part in parts])


def lengths(parts: list[Part]) -> list[list[int]]:
    """Return the lengths of the rows of each part."""
    return [[len(row.ids) for row in part.batch.rows] for part in parts]


@pytest.mark.parametrize("kind", DEPENDENT)
@pytest.mark.slow
def test_a_run_of_mixed_lengths_is_proven(kind: str, tmp_path: Path) -> None:
    """Files with rows on both sides of the original length, in one process: training the last one again is the same."""
    base = tiny.save_tiny_model(tmp_path / "base", layers=2)
    values = json.loads((base / "config.json").read_text())
    rope = {**KINDS[kind], "rope_theta": 100.0, "original_max_position_embeddings": 120}
    (base / "config.json").write_text(json.dumps(values | {"rope_parameters": rope, "max_position_embeddings": 120}))
    run = Run.create(tmp_path / "run", str(base), batch_size=4, max_length=256)
    rows = [{"text": "a" * length} for length in (40, 200, 60, 230, 119, 120, 121, 40)]
    run.train(tiny.write_jsonl(tmp_path / "long.jsonl", rows))
    run.train(tiny.write_jsonl(tmp_path / "mixed.jsonl", rows[::-1]))
    assert run.verify(deep=True).ok
