"""Shortens a model's vocabulary: tokens are vectors to it, and what holds for some of them holds for the rest.

That is proven on the model itself before anything is left out: ids reach it only through its embedding, which looks
vectors up, and each logit is the product of one row of its head with a hidden state, treated like every other logit.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from onward.data.plan.loader import Batch
from onward.training.admission.inputs import LONG, SHORT, rows, tokens
from onward.training.admission.small.alike import NUMBER
from onward.training.admission.small.narrow import configs_of, still
from onward.training.device.environment import autocast
from onward.training.device.errors import is_of_the_device
from onward.training.layers.buffers import Buffers
from onward.training.layers.head import RANGE, explain
from onward.training.layers.twin import HOOKS
from onward.training.model.load import causal_lm
from onward.training.seeds import seeded

ROWS = 512
"""How many ids are left for the rows of a proof; none of them has a meaning in a config."""
_MEANING = re.compile(r"(^|_)(id|ids|idx|index)$")
"""Keys under which configs and modules keep single ids, such as those of padding, end and image tokens."""
_STEP, _VALUES = 40_503, 65_521
"""Multiples of the first run through all values modulo the second, which is a prime number."""


@dataclass(frozen=True)
class _Tables:
    """What a model has for each id: a row of its embedding and one of its head, which may be the same weight."""

    embedding: nn.Embedding
    head: nn.Linear

    @property
    def weights(self) -> list[nn.Parameter]:
        """Return each weight once, including a head's bias."""
        return list(dict.fromkeys((*self.embedding.parameters(), *self.head.parameters())))

    def cut(self, count: int) -> Callable[[], None]:
        """Keep only the first rows, as views; return a function that restores all of them."""
        embedding, head, weights = self.embedding, self.head, self.weights
        whole = [weight.data for weight in weights]
        sizes = embedding.num_embeddings, embedding.padding_idx, head.out_features
        for weight in weights:
            weight.data = weight.data[:count]
        embedding.num_embeddings = head.out_features = count
        if embedding.padding_idx is not None and embedding.padding_idx >= count:
            embedding.padding_idx = None  # pyright: ignore[reportAttributeAccessIssue]  # no row has that id

        def restore() -> None:
            for weight, data in zip(weights, whole, strict=True):
                weight.data = data
            embedding.num_embeddings, embedding.padding_idx, head.out_features = sizes

        return restore


def vocabulary_of(model: nn.Module) -> range:
    """Return the token ids that a model both takes and predicts: an embedding may have more rows than its head."""
    base = causal_lm(model)
    parts = [base.get_input_embeddings(), base.get_output_embeddings()]
    return range(min(len(cast(Any, part).weight) for part in parts if hasattr(part, "weight")))


def shorten_vocabulary(model: nn.Module, vocabulary: range, device: torch.device, dtype: torch.dtype) -> range:
    """Keep only the first rows of a model's embedding and head, if the others could not show anything else.

    Both stay whole if either has an adapter, trained rows, hooks or a forward pass of its own, if anything else has as
    many rows, or if the model does more with ids than look them up, or does not treat all logits alike.

    Args:
        vocabulary: the token ids that the model both takes and predicts.

    Returns:
        The ids that rows may have from now on; the same as before if the model stays whole.
    """
    base = causal_lm(model)
    tables, left = _tables(base), _ids_left(model, vocabulary)
    if tables is None or left is None or _is_as_long(model, tables):
        return vocabulary
    try:
        if not _are_vectors(base, tables, vocabulary, device, dtype):
            return vocabulary
    except Exception as error:  # it does not accept vectors
        if is_of_the_device(error):
            raise
        return vocabulary
    restore = tables.cut(left.stop)
    try:
        runs(base, rows([SHORT], left), device, dtype)
    except Exception as error:  # it depends on the vocabulary's size in some way of its own
        if is_of_the_device(error):
            raise
        restore()
        return vocabulary
    return left


def runs(model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> None:
    """Compute the logits of the first row; raise if that fails."""
    base = causal_lm(model)
    with _computing(base, device, dtype):
        cast(Any, base)(input_ids=tokens(batch.rows[0], device), use_cache=False)


def _tables(base: PreTrainedModel) -> _Tables | None:
    """Return a model's embedding and head if they are plain, equally long, and without hooks."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear or embedding.max_norm is not None:
        return None
    held = [vars(part) for part in (embedding, head)]
    if any("forward" in each or any(each[name] for name in HOOKS) for each in held):
        return None
    tables = _Tables(embedding, head)
    are_plain = all(type(weight) is nn.Parameter for weight in tables.weights)
    return tables if are_plain and len(embedding.weight) == len(head.weight) else None


def _ids_left(model: nn.Module, vocabulary: range) -> range | None:
    """Return the first consecutive ids without a special one; None if that would leave most of the vocabulary."""
    special = sorted(set(_special(model)))
    for first in (0, *(each + 1 for each in special)):
        if not any(each in range(first, first + ROWS) for each in special):
            return range(first, first + ROWS) if 2 * (first + ROWS) <= len(vocabulary) else None
    return None


def _special(model: nn.Module) -> Iterator[int]:
    """Yield the numbers that configs and modules keep under names of ids."""
    for owner in (*configs_of(causal_lm(model)), *model.modules()):
        for key, value in vars(owner).items():
            for each in value if isinstance(value, list | tuple) else [value]:
                if isinstance(each, int) and key != NUMBER and _MEANING.search(key):
                    yield each


def _is_as_long(model: nn.Module, tables: _Tables) -> bool:
    """Whether a tensor of a model other than its embedding and head has as many rows or columns as they have."""
    own = {id(weight) for weight in tables.weights}
    held = (each for part in model.modules() for each in vars(part).values())
    tensors = (*model.parameters(), *model.buffers(), *(each for each in held if isinstance(each, torch.Tensor)))
    return any(id(tensor) not in own and len(tables.head.weight) in tensor.shape for tensor in tensors)


def _are_vectors(
    base: PreTrainedModel, tables: _Tables, vocabulary: range, device: torch.device, dtype: torch.dtype
) -> bool:
    """Return whether a model gives the same for ids as for their vectors, and treats each logit by one function.

    The head itself is not run, because it would take as long as the layers; the model gets known values in its place.
    """
    row = tokens(rows([LONG], vocabulary).rows[0], device)
    hidden: list[torch.Tensor] = []
    given: list[torch.Tensor] = []

    def stand_in(states: torch.Tensor) -> torch.Tensor:
        hidden.append(states)
        kind = nn.functional.linear(states[..., :1, :], tables.head.weight[:1]).dtype
        given.append(_values((*states.shape[:-1], tables.head.out_features), device).to(kind))
        return given[-1]

    with _computing(base, device, dtype):
        vectors = tables.embedding(row)
        if not _looks_up(tables.embedding, row, vectors):
            return False
        vars(tables.head)["forward"] = stand_in
        try:
            logits = cast(Any, base)(input_ids=row, use_cache=False).logits
            of_vectors = cast(Any, base)(inputs_embeds=vectors, use_cache=False).logits
        finally:
            del vars(tables.head)["forward"]
    are_equal = len(hidden) == 2 and torch.equal(*hidden) and torch.equal(logits, of_vectors)
    if not are_equal or given[0].shape != logits.shape:
        return False
    return explain(given[0], logits, base.config) is not None


def _looks_up(embedding: nn.Embedding, row: torch.Tensor, vectors: torch.Tensor) -> bool:
    """Whether an embedding returns rows of its weight, all multiplied by the same constant."""
    if type(embedding) is nn.Embedding:
        return True
    plain = embedding.weight[row]
    kept = (*vars(embedding).values(), *embedding.buffers())
    factors = [each for each in kept if isinstance(each, float) or (isinstance(each, torch.Tensor) and each.dim() == 0)]
    scaled = (plain * (each.to(plain.dtype) if isinstance(each, torch.Tensor) else each) for each in factors)
    return any(torch.equal(each, vectors) for each in (plain, *scaled))


def _values(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return made-up logits, of which neighbours differ."""
    places = torch.arange(math.prod(shape), device=device)
    return ((places * _STEP % _VALUES).float() * (2 * RANGE / _VALUES) - RANGE).view(shape)


@contextlib.contextmanager
def _computing(base: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Generator[None]:
    """Compute in the body without gradients and without dropout; buffers and generators are restored."""
    buffers = Buffers(base)
    try:
        with still(base), seeded(0, device), torch.no_grad(), autocast(device, dtype):
            yield
    finally:
        buffers.restore()
