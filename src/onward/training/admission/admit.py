"""The admission of a model: everything is proven on the model itself, with small rows, before a run trains it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

from torch import nn

from onward.errors import ModelError, OnwardError, first_line
from onward.training.admission import gradients, longer, reach
from onward.training.admission.causality import as_float32, looks_ahead
from onward.training.admission.findings import BY_LENGTH, END_TO_END, PADDED, Findings, named
from onward.training.admission.inputs import LONG, MIDDLE, SHORT, rows
from onward.training.admission.positions import most_positions
from onward.training.admission.proof import Found, Proof
from onward.training.admission.purity import Marks
from onward.training.admission.remedies import NO_REMEDY, causal_hint, working_hint
from onward.training.admission.roundtrip import not_loaded_back
from onward.training.admission.small.alike import reached_by_kinds
from onward.training.admission.small.narrow import narrow, still
from onward.training.admission.small.shorten import layers_to_shorten, shorten
from onward.training.admission.small.vocabulary import runs, shorten_vocabulary, vocabulary_of
from onward.training.admission.small.width import narrow_width
from onward.training.admission.together import examine_together
from onward.training.device.errors import is_of_the_device
from onward.training.layers.attention import PADDING_FREE
from onward.training.layers.twin import named_types
from onward.training.measuring.probe import Probe
from onward.training.model.adapter import ALL_LINEAR
from onward.training.model.load import build_plain, causal_lm
from onward.training.model.spec import ModelSpec, environment_of
from onward.training.optimizers import optimizer_method


def admit(
    spec: ModelSpec,
    *,
    checkpoint: Path | None = None,
    settings: dict[str, Any] | None = None,
    strict: bool = True,
) -> Findings:
    """Prove that a model trains correctly under a config; the model is loaded for that and freed again.

    Args:
        checkpoint: folder to take trained weights and the adapter's config from.
        settings: config keys that were given another value because their default does not work.
        strict: refuse what cannot be proven; otherwise it becomes a warning (for a run that has trained).

    Raises:
        ModelError: the model cannot be loaded, or something about it cannot be proven.
        ConfigError: a setting does not fit the model.
    """
    proof = Proof(spec, strict)
    optimizer_method(spec.config).require(spec.device)
    model = build_plain(spec, checkpoint=checkpoint, strict=strict)
    begun = time.perf_counter()
    found = Found()
    try:
        _prove(proof, model, found)
    except OnwardError:
        raise
    except Exception as error:  # a model may fail in unforeseen ways
        if is_of_the_device(error):
            raise
        proof.refuse(f"the model fails on small rows: {type(error).__name__}: {first_line(error)}", NO_REMEDY)
    if not strict:
        found.left_out, found.end_to_end = (), causal_lm(model).config.model_type in PADDING_FREE
    return _findings(proof, found, settings or {}, time.perf_counter() - begun)


def _findings(proof: Proof, found: Found, settings: dict[str, Any], seconds: float) -> Findings:
    """Return the findings of a finished proof."""
    spec = proof.spec
    return Findings(
        rows=END_TO_END if found.end_to_end else BY_LENGTH if found.by_length else PADDED,
        why_padded=found.why_padded,
        difference=found.difference,
        trained=found.trained,
        reach=found.reach,
        left_out=found.left_out,
        unreached=found.unreached,
        settings=settings,
        warnings=tuple(proof.warnings),
        environment=environment_of(spec),
        seconds=round(seconds, 3),
        writers=found.writers,
    )


def _prove(proof: Proof, model: nn.Module, found: Found) -> None:
    """Prove which weights of the whole model are reached, and everything else with as few layers as it takes."""
    vocabulary = vocabulary_of(model)
    few = rows([SHORT], vocabulary)
    gradients.shift_adapter(model, proof.spec.device)
    lists = layers_to_shorten(model)
    with still(model):
        by_kinds = reached_by_kinds(
            model, lists, lambda: proof.row_by_row(model, few).of.keys(), lambda: proof.logits(model, few)
        )
        with _told_why_not(proof):
            reached = proof.row_by_row(model, few).of.keys() if by_kinds is None else by_kinds
            reached = longer.reached_by_long_rows(proof.spec, model, vocabulary, reached)
    _examine_reach(proof, model, reached, found)
    shorten(lists, (lambda: proof.row_by_row(model, few)) if by_kinds is None else lambda: None)
    del lists  # and with them the layers that were left out
    vocabulary = _make_small(proof, model, vocabulary)
    _require_causal(proof, model, vocabulary)
    _require_positions(proof, model, vocabulary)
    narrow(causal_lm(model))
    examine_together(proof, model, vocabulary, found)
    _require_repeatable(proof, model, vocabulary)
    found.writers = _require_untouched(proof, model)


def _make_small(proof: Proof, model: nn.Module, vocabulary: range) -> range:
    """Keep a share of the inner columns and of the vocabulary; return the token ids that are left.

    A model with a non-finite number in it stays whole, so that it is found. So does one on a GPU: products cost little
    there, and other shapes may select other kernels.
    """
    device, dtype = proof.spec.device, proof.spec.dtype
    if device.type != "cpu" or not proof.is_finite:
        return vocabulary
    narrow_width(model, device, dtype, lambda: runs(model, rows([SHORT], vocabulary), device, dtype))
    return shorten_vocabulary(model, vocabulary, device, dtype)


@contextlib.contextmanager
def _told_why_not(proof: Proof) -> Generator[None]:
    """Refuse a model that cannot process a row in the body: a failure here is the model's own."""
    try:
        yield
    except OnwardError:
        raise
    except Exception as error:
        if is_of_the_device(error):
            raise
        hint = working_hint(proof.spec.config, proof.spec.base, proof.spec.device, proof.spec.dtype)
        raise ModelError(
            f"the model computes no loss of a row of text: {first_line(error)}", where=proof.spec.base, hint=hint
        ) from None


def _examine_reach(proof: Proof, model: nn.Module, reached: Collection[str], found: Found) -> None:
    """Leave out what no gradient reaches, and determine the share of the model that is left."""
    found.left_out = _leave_out(proof, model, reached)
    found.trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found.reach = round(reach.share_reached(model, causal_lm(model)), 4)
    if proof.spec.config.method != "full" and proof.spec.config.lora.targets == ALL_LINEAR:
        found.unreached = reach.large_without_adapter(model, causal_lm(model), found.left_out)


def _require_causal(proof: Proof, model: nn.Module, vocabulary: range) -> None:
    model.eval()
    with as_float32(model):
        ahead = looks_ahead(model, vocabulary, proof.spec.device)
    model.train()
    if ahead:
        what = "the model looks ahead: changing the last token of a row changes logits before it"
        proof.refuse(what, causal_hint(proof.spec.base, proof.spec.device))


def _require_positions(proof: Proof, model: nn.Module, vocabulary: range) -> None:
    model.eval()
    longest = proof.spec.config.max_length
    limit = most_positions(causal_lm(model), vocabulary, longest, proof.spec.device, proof.spec.dtype)
    model.train()
    if limit is not None:
        hint = f"Set max_length to at most {limit}: --set max_length={limit}, or in the config."
        proof.refuse(f"max_length is {longest}, the model has {limit} positions", hint, where="max_length")


def _leave_out(proof: Proof, model: nn.Module, reached: Collection[str]) -> tuple[str, ...]:
    """Freeze weights that no gradient reaches; return the names by which a run leaves them out.

    Raises:
        ModelError: no gradient reaches any weight.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    dead = tuple(dict.fromkeys([*reach.without_gradient(trained, reached), *not_loaded_back(model)]))
    for name in dead:
        trained[name].requires_grad_(False)
    if len(dead) == len(trained):
        what = "no gradient reaches any of the weights to be trained"
        raise ModelError(
            what, where=proof.spec.base, hint="Name other modules, --set lora.targets=..., or --set method=full"
        )
    if dead and not proof.strict:
        proof.warnings.append(f"no gradient reaches {named(dead)}")
    return dead if proof.spec.config.method == "full" else reach.modules_of(dead)


def _require_repeatable(proof: Proof, model: nn.Module, vocabulary: range) -> None:
    """Take a step, one with longer rows, and the first one again, with dropout."""
    short, long = rows([MIDDLE], vocabulary), rows([LONG], vocabulary)
    taken = [
        gradients.of_step(model, batch, proof.spec.config, proof.spec.device, proof.spec.dtype).digest()
        for batch in (short, long, short)
    ]
    if taken[0] != taken[2]:
        what = "two equal steps have different gradients: the model keeps state that no checkpoint contains"
        proof.refuse(what, NO_REMEDY)


def _require_untouched(proof: Proof, model: nn.Module) -> tuple[str, ...]:
    """Evaluate the model like the handover's probe, and check every weight and buffer; return what writes to them."""
    marks = Marks(model)
    config = proof.spec.config
    probe = Probe(model, config.seed, proof.spec.device, proof.spec.dtype, exact=config.deterministic)
    probe.of_model()
    changed = tuple(marks.changed())
    if changed:
        proof.refuse(f"evaluating the model changes its own {named(changed)}", NO_REMEDY)
    return named_types(probe.writers)
