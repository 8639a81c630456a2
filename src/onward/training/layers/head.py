"""The head of a model, separated from the rest, so that only targets get logits, and never all at once.

What a model does to the output of its head before returning it (scaling, a cap, a cast) is found by replacing that
output with known values and examining what comes back; constants are taken from its config. If that cannot be explained
to the last bit, the head is not separated: the model computes all of its logits itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedConfig

from onward.training.layers import cross_entropy

Form = Literal["times", "over", "cap"]
LossOfChunk = Callable[[torch.Tensor, slice], torch.Tensor]
"""Returns the loss (scalar) of some tokens from their hidden states, shape (chunk, width), and their places."""
RANGE = 60.0
"""A tail is tried on logits between minus and plus this."""
IDS = (1, 2, 1)
"""The tokens of the forward pass in which it is tried."""


@dataclass(frozen=True)
class Tail:
    """What a model does to each logit of its head: nothing, or one of these forms with a constant.

    Args:
        form: `times` and `over` scale; `cap` is `constant * tanh(logit / constant)`.
        in_float: whether the logit is converted to float32 first, whatever the head's type.
    """

    form: Form = "times"
    constant: float = 1.0
    in_float: bool = False

    @property
    def scale(self) -> float | None:
        """The factor of a tail that only scales, else None."""
        return {"times": self.constant, "over": 1.0 / self.constant, "cap": None}[self.form]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the model's logits from those of its head, any shape."""
        if self.in_float:
            logits = logits.float()
        if self.form == "times":
            return logits * self.constant if self.constant != 1.0 else logits
        if self.form == "over":
            return logits / self.constant
        return torch.tanh(logits / self.constant) * self.constant


@dataclass(frozen=True)
class Head:
    """A head that can be computed separately.

    Args:
        module: takes hidden states of shape (..., width), returns logits of shape (..., vocabulary).
        tail: what the model does to them.
    """

    module: nn.Module
    tail: Tail

    def hidden(self, forward: Callable[[], object]) -> torch.Tensor:
        """Return the head's input in a forward pass of the model, shape (B, T, width); one position gets logits."""
        taken: list[torch.Tensor] = []

        def take(_module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            taken.append(given[0])
            return (given[0][:, :1],)

        with _hook(self.module.register_forward_pre_hook(take)):
            forward()
        return taken[-1]

    def loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the summed cross-entropy (nats, float32 scalar) of hidden states of shape (tokens, width).

        Args:
            counts: float32, shape (tokens,): what the loss of each token counts; None where each counts 1.
        """
        plain = self._plain_factors(hidden)
        if plain is not None:
            return cross_entropy.linear_cross_entropy(*plain, labels, dtype, counts)

        def loss(part: torch.Tensor, there: slice) -> torch.Tensor:
            return self.plain(part, labels[there], None if counts is None else counts[there])

        slices = self.slices(len(hidden))
        if not torch.is_grad_enabled():
            return sum((loss(hidden[there], there) for there in slices), start=torch.zeros((), device=hidden.device))
        return self.in_chunks(hidden, slices, loss)

    def in_chunks(self, hidden: torch.Tensor, slices: Sequence[slice], loss: LossOfChunk) -> torch.Tensor:
        """Return the sum of the losses of slices of hidden states, in their order.

        The gradient is made in the forward pass, so that what a loss keeps is freed before the next one is computed.

        Args:
            hidden: shape (tokens, width).
            slices: of the tokens, all of them once.
            loss: may use the head's weights, which get their gradients.
        """
        trained = [weight for weight in self.module.parameters() if weight.requires_grad]
        return cast(Any, _InChunks).apply(hidden, slices, loss, *trained)

    def scores(
        self, hidden: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return `linear_scores` of hidden states, shape (tokens, width); None if that takes all logits."""
        plain = self._plain_factors(hidden)
        return None if plain is None else cross_entropy.linear_scores(*plain, labels, dtype)

    def _plain_factors(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return two factors whose product is the model's logits; None if they are not a plain product."""
        scale = self.tail.scale
        if scale is None or type(self.module) is not nn.Linear or cast(Any, self.module).bias is not None:
            return None
        return hidden if scale == 1.0 else hidden * scale, self.module.weight

    def plain(self, hidden: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
        """Return the loss with all logits at once."""
        return counted_cross_entropy(self.logits(hidden), labels, counts)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the model's logits of hidden states, float32, shape (tokens, vocabulary)."""
        return self.tail(self.module(hidden)).float()

    def slices(self, tokens: int) -> list[slice]:
        """Return slices of as many tokens at a time as have `LOGITS_BYTES` of logits."""
        vocabulary = max(len(weight) for weight in self.module.parameters())
        size = max(1, cross_entropy.LOGITS_BYTES // (4 * vocabulary))
        return [slice(first, min(first + size, tokens)) for first in range(0, max(1, tokens), size)]


def counted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Return the summed cross-entropy (nats) of logits, shape (tokens, vocabulary), weighted by `counts`."""
    if counts is None:
        return functional.cross_entropy(logits, labels, reduction="sum")
    return (functional.cross_entropy(logits, labels, reduction="none") * counts).sum()


def scores_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy (nats) of each row of logits, and whether its label ranks first, as in `linear_scores`.

    Args:
        logits: float32, shape (tokens, vocabulary); overwritten.
        labels: int64, shape (tokens,).
    """
    chosen, largest = logits.gather(1, labels[:, None]), logits.amax(1, keepdim=True)
    hits = (chosen == largest)[:, 0]
    hits[hits.clone()] = logits[hits].argmax(1) == labels[hits]
    shares = torch.softmax(logits, 1, out=logits)  # its largest is one over the sum of the exponentials
    return (largest - shares.amax(1, keepdim=True).log_() - chosen)[:, 0], hits


class _InChunks(torch.autograd.Function):
    """The loss of a chunk of tokens at a time, with the gradient computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, slices: Sequence[slice], loss: LossOfChunk, *trained: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        hidden_grad = torch.zeros_like(hidden)
        sums = [torch.zeros_like(weight) for weight in trained]
        for there in slices:
            own = hidden.detach()[there].requires_grad_()
            with torch.enable_grad():
                found = loss(own, there)
            own_grad, *grads = cast(Any, torch.autograd.grad(found, [own, *trained], allow_unused=True))
            total += found.detach()
            hidden_grad[there] = own_grad
            for held, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    held += grad
        ctx.save_for_backward(hidden_grad, *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_grad, *grads = (grad * grad_outputs[0] for grad in ctx.saved_tensors)
        return (hidden_grad, None, None, *grads)


def find_head(model: nn.Module, device: torch.device) -> Head | None:
    """Return the head of a model if it explains the logits to the last bit, or None.

    This takes one forward pass over a few tokens, without gradients; random generators are left as they were. The
    caller has to restore the buffers.

    Args:
        model: a causal language model, with or without an adapter around it.
    """
    causal_lm: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    module = causal_lm.get_output_embeddings()
    if not isinstance(module, nn.Module):
        return None
    given: list[torch.Tensor] = []
    fits: list[bool] = []

    def replace(_module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        fits.append(len(inputs) == 1 and inputs[0].shape[:2] == output.shape[:2] == (1, len(IDS)))
        values = torch.linspace(-RANGE, RANGE, output.numel(), device=output.device)
        given.append(values.view_as(output).to(output.dtype))
        return given[-1]

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), _hook(module.register_forward_hook(replace)):
        ids = torch.tensor([IDS], device=device) % cast(Any, model).get_input_embeddings().weight.shape[0]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if fits != [True] or given[0].shape != logits.shape:
        return None
    tail = explain(given[0], logits, causal_lm.config)
    return None if tail is None else Head(module, tail)


def explain(given: torch.Tensor, logits: torch.Tensor, config: PreTrainedConfig) -> Tail | None:
    """Return what a model did to the output of its head, if that explains its logits to the last bit.

    Args:
        given: the head's output, shape (B, T, vocabulary), like the logits.
        config: the model's config; constants are taken from it.
    """
    tails = [Tail(), Tail(in_float=True)]
    for constant in sorted(set(_numbers(config.to_dict())) - {0.0, 1.0}):
        for form in ("times", "over", "cap"):
            tails += [Tail(form, constant), Tail(form, constant, in_float=True)]
    few = slice(None, None, max(1, given.numel() // 1024))
    given, wanted = given.reshape(-1), logits.float().reshape(-1)
    for tail in tails:
        if torch.equal(tail(given[few]).float(), wanted[few]) and torch.equal(tail(given).float(), wanted):
            return tail
    return None


def _numbers(value: object) -> Iterator[float]:
    """Yield every number in a config, however deep."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield float(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for each in cast(Any, inner):
        yield from _numbers(each)


@contextlib.contextmanager
def _hook(handle: Any) -> Generator[None]:
    """Remove a hook after the body."""
    try:
        yield
    finally:
        handle.remove()
