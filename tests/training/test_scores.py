"""What a model scores: equal to plain transformers for every kind of adapter, and nothing of the model changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import small_model
from torch.nn import functional

from onward.config import Config
from onward.data.tokenized import Row
from onward.training.device.execution import Execution
from onward.training.layers import cross_entropy
from onward.training.layers.attention import lay_end_to_end
from onward.training.layers.head import scores_of
from onward.training.measuring.scores import Compute, Meter, divergences
from onward.training.model.expert_lora import wrap_experts
from onward.training.model.load import make_fast
from onward.training.steps.anchor import AnchorTerm, top_divergences, top_of
from onward.training.steps.loss import TargetLoss
from onward.training.world import SingleProcess

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


def rows(count: int, vocabulary: int = 300) -> list[Row]:
    """Rows of different lengths with some targets."""
    source = np.random.default_rng(0)
    return [
        Row(source.integers(0, vocabulary, 9 + 3 * place), np.r_[False, source.random(8 + 3 * place) > 0.4])
        for place in range(count)
    ]


def compute(**settings: Any) -> Compute:
    """How tests measure."""
    return Compute(Config(**settings), Execution(SingleProcess(torch.device("cpu")), torch.float32))


def plain(model: Any, some: list[Row]) -> torch.Tensor:
    """Logits of the targets as the model itself computes them, row by row."""
    with torch.no_grad():
        found = [model(input_ids=torch.from_numpy(row.ids)[None]).logits[0, :-1] for row in some]
    return torch.cat([logits[torch.from_numpy(row.targets)[1:]] for logits, row in zip(found, some, strict=True)])


def labels(some: list[Row]) -> torch.Tensor:
    """The targets."""
    return torch.cat([torch.from_numpy(row.ids)[1:][torch.from_numpy(row.targets)[1:]] for row in some])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_model_and_of_its_base(kind: str) -> None:
    """Loss, accuracy and divergence are those of plain transformers; without its adapter a model scores as its base."""
    base = small_model("llama").eval()
    before = plain(base, rows(5))
    adapter = LoraConfig(r=2, lora_alpha=64, init_lora_weights=False, **KINDS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), adapter)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad and "lora" not in name:
                    weight.add_(0.1 * torch.randn_like(weight))
    after = plain(copy.deepcopy(model).eval(), rows(5))
    wrap_experts(model)
    make_fast(model, torch.device("cpu"), end_to_end=True)
    trained = {name: (weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()}
    meter = Meter(model.train(), compute())
    wanted = labels(rows(5))
    score, own = meter.score(rows(5)), meter.without_adapter()
    assert float(functional.cross_entropy(after.double(), wanted)) == pytest.approx(score.loss, rel=1e-6)
    assert float((after.argmax(-1) == wanted).double().mean()) == score.accuracy
    assert len(wanted) == score.tokens
    assert float(functional.cross_entropy(before.double(), wanted)) == pytest.approx(own.score(rows(5)).loss, rel=1e-6)
    far = float(divergences(before.double(), after.double()).mean())
    assert far == pytest.approx(meter.divergence(own, rows(5)), rel=1e-4)
    assert far > 1e-4
    assert model.training
    assert trained == {name: (weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [1, 4, 64])
def test_scores_need_no_whole_logits(monkeypatch: pytest.MonkeyPatch, words: int, dtype: torch.dtype) -> None:
    """However the vocabulary is cut, losses are those of whole logits, and of equal logits the first one is a hit."""
    monkeypatch.setattr(cross_entropy, "WORDS", words)
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", {"cpu": 1})
    draws = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (200, 3), generator=draws).float()
    weight = torch.randint(-2, 3, (37, 3), generator=draws).float()  # whole numbers: many logits are equal, exactly
    logits = hidden @ weight.T
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    wanted = torch.where(torch.arange(200) % 2 == 0, first, torch.randint(0, 37, (200,), generator=draws))
    expected = functional.cross_entropy(logits, wanted, reduction="none").tolist()
    losses, hits = cross_entropy.linear_scores(hidden, weight, wanted, dtype)
    assert (first == wanted).tolist() == hits.tolist()
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    losses, hits = scores_of(logits.clone(), wanted)
    assert (first == wanted).tolist() == hits.tolist()
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mamba", "rwkv"])
def test_families_are_measured_and_write(family: str, tmp_path: Path) -> None:
    """Models of other kinds (padded, capped logits, recurrent) score as they are, and write texts from a seed."""
    del tmp_path
    model = small_model(family).eval()
    meter = Meter(copy.deepcopy(model), compute())
    some = rows(4)
    loss = float(functional.cross_entropy(plain(model, some).double(), labels(some)))
    assert loss == pytest.approx(meter.score(some).loss, rel=1e-5)
    texts = meter.write((3, 6), 1)
    assert [1, 1, 1] == [text[0] for text in texts]
    assert [6, 6, 6] == list(map(len, texts))
    assert texts == meter.write((3, 6), 1)


def test_the_kept_part_of_the_base_is_a_lower_bound() -> None:
    """With all but one token kept the term is the whole divergence; no gradient where the model is the base."""
    draws = torch.Generator().manual_seed(0)
    base, model = torch.randn(7, 40, generator=draws).double(), torch.randn(7, 40, generator=draws).double()
    ids, logs = top_of(base)
    assert top_divergences(ids, logs, model).tolist() == pytest.approx(divergences(base, model).tolist())
    few = top_divergences(ids[:, :5], logs[:, :5], model)
    assert bool((few <= divergences(base, model)).all())
    same = base.clone().requires_grad_()
    top_divergences(ids[:, :5], logs[:, :5], same).sum().backward()
    assert same.grad is not None
    assert float(same.grad.abs().max()) < 1e-12
    certain = 200.0 * torch.eye(70)  # no probability is left for the tokens that are not kept
    assert top_divergences(*top_of(certain), certain).abs().max() < 1e-5


def test_the_anchor_adds_the_gradients_of_its_term() -> None:
    """Weight times divergence, mean over the targets of the step's texts, whichever of them are computed together."""
    model, base = small_model("llama").train(), small_model("llama", seed=1)
    ids = np.random.default_rng(0).integers(0, 60, (3, 6))
    texts = [Row(text, np.arange(6) > 0) for text in ids]
    with torch.no_grad():
        kept = top_of(base(input_ids=torch.from_numpy(ids)).logits[:, :-1])
    term, config = AnchorTerm(texts, *kept, 0.5), Config(batch_size=16, micro_batch_tokens=7, seed=3)
    chosen = term.chosen(4, config)
    logits = model(input_ids=torch.from_numpy(ids[chosen])).logits[:, :-1]
    expected = top_divergences(*(each[chosen].flatten(0, 1) for each in kept), logits.flatten(0, 1)).mean()
    gradients = torch.autograd.grad(0.5 * 4.0 * expected, list(model.parameters()))
    lay_end_to_end(model)
    for tokens in (7, 100):
        own = config.model_copy(update={"micro_batch_tokens": tokens})
        loss = TargetLoss(model, torch.device("cpu"), torch.float32)
        found = [term.add_gradients(loss, texts, factor=4.0) for texts in term.placed(loss, 4, own)]
        assert float(expected.detach()) == pytest.approx(float(torch.stack(found).sum()), rel=1e-5)
        torch.testing.assert_close([weight.grad for weight in model.parameters()], list(gradients))
        model.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_texts_in_chunks_have_the_gradients_of_all_at_once(
    family: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are those of a graph that keeps the logits of all chunks; what is kept is one chunk."""
    model = small_model(family).train()  # whose head is trained, too
    if family == "llama":
        lay_end_to_end(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 4 * vocabulary * tokens)
    loss = TargetLoss(model, torch.device("cpu"), torch.float32)
    texts = [Row(np.arange(6) + place, np.arange(6) > 0) for place in range(2)]
    term = AnchorTerm(texts, torch.arange(40).reshape(2, 5, 4), torch.full((2, 5, 4), -2.0), 0.3)
    (placed,) = term.placed(loss, 0, Config(batch_size=16, micro_batch_tokens=100))
    first, parts = 0, list[torch.Tensor]()
    torch.manual_seed(0)  # of dropout
    for logits, labels in loss.logits(placed.rows):
        there = slice(first, first := first + len(labels))
        parts.append(top_divergences(placed.ids[there], placed.logs[there], logits).sum())
    expected = torch.stack(parts).sum() / placed.targets
    (0.3 * 4.0 * expected).backward()
    gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    torch.manual_seed(0)
    found = term.add_gradients(loss, placed, factor=4.0)
    assert -(-10 // tokens) == len(parts)
    assert torch.equal(expected, found)
    assert all(map(torch.equal, gradients, [weight.grad for weight in model.parameters()]))


def test_each_text_comes_once_before_one_comes_twice() -> None:
    """Anchor texts of the steps are a function of seed and step, one per 8 rows of a step."""
    term = AnchorTerm(rows(5), torch.empty(0), torch.empty(0), 0.1)
    config = Config(batch_size=16)
    chosen = [place for step in range(5) for place in term.chosen(step, config)]
    assert [*range(5), *range(5)] == [*sorted(chosen[:5]), *sorted(chosen[5:])]
    assert 1 == len(term.chosen(0, Config(batch_size=4)))
    assert chosen != [place for step in range(5) for place in term.chosen(step, Config(batch_size=16, seed=1))]
