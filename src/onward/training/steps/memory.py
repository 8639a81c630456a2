"""How much of the device's memory a step takes: measured on the model itself, extrapolated to the parts of a step.

What the backward pass keeps of a row is counted in small forward passes. It is a polynomial in the row's length: a
constant, a term per token, and one per pair of tokens if attention keeps its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from onward.config import Config
from onward.config.keys import MICRO_BATCH_TOKENS
from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference
from onward.data.tokenized import Row
from onward.training.device.memory import Usage
from onward.training.layers.cross_entropy import CHUNK_BYTES, LOGITS_BYTES, TILE_BYTES
from onward.training.layers.recompute import Recomputation
from onward.training.model.load import causal_lm
from onward.training.optimizers import OptimizerMethod
from onward.training.transfer import Sizes

FACT = "memory"
"""The ledger's fact in which a run keeps what was measured of its model."""
LONGEST = 48
"""Tokens of the longest row that is measured."""
USABLE = 0.92
"""The share of the available memory that a step may take."""
HOLES = {"full": (1.10, 3.0), "adapter": (1.33, 2.3), "4-bit": (1.75, 8.5)}
"""Memory of a process on a CPU per byte that the backward pass keeps, without and with recomputation. Its heap keeps
holes: small tensors that stay, such as those of an adapter, lie among large ones that are freed, such as recomputed
layers and weights that are expanded from 4 bits. Checked with parts of 64 to 4,096 tokens of a model of 135 million
weights (`bench/memory.py`). In memory that CUDA's allocator reports as allocated there are no holes."""
LIBRARIES = {"full": 60_000_000, "adapter": 60_000_000, "4-bit": 110_000_000}
"""What libraries take on first use on a CPU, and what is left of loading."""
CRUDE = 8
"""The most bytes that a token leaves, in usual models, per feature that goes into or out of a linear layer, those of
chosen experts included."""
SCORE = 12
"""The most bytes that attention leaves for each of its scores, where it keeps them: scores, mask and product."""


@dataclass(frozen=True)
class Polynomial:
    """Bytes of a part: a constant, bytes per token, and bytes per pair of tokens of a row."""

    constant: float
    token: float
    pair: float

    def __call__(self, lengths: Sequence[int]) -> int:
        """Return the bytes of rows of these lengths."""
        return int(self.constant + sum(self.token * length + self.pair * length**2 for length in lengths))


@dataclass(frozen=True)
class Profile:
    """What a model takes, in bytes.

    Args:
        base: weights that are not trained, and buffers.
        trained: weights that are.
        moments: the optimizer's state.
        whole: what the backward pass keeps of the rows of a part.
        recomputed: the same with recomputed layers; None if they cannot be recomputed.
        layers: lists of modules that are computed one after another; one of them is recomputed at a time.
        vocabulary: logits of a token.
        trained_head: bytes of the head's weights if they are trained.
        device: type of the device.
        kind: what is trained, as in `HOLES`.
        workspace: what a step of the optimizer takes while it runs.
        pinned: the main memory that PyTorch takes for a copy from a GPU.
    """

    base: int
    trained: int
    moments: int
    whole: Polynomial
    recomputed: Polynomial | None
    layers: int
    vocabulary: int
    trained_head: int
    device: str
    kind: str = "adapter"
    workspace: int = 0
    pinned: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self | None:
        """Return the profile that a ledger kept; None if there is none."""
        if values is None:
            return None
        again = values["recomputed"]
        kept: dict[str, Any] = {
            "whole": Polynomial(**values["whole"]), "recomputed": Polynomial(**again) if again else None
        }  # fmt: skip
        return cls(**{**values, **kept})

    def estimate(self, lengths: Sequence[int], *, recompute: bool = False, alone: bool = False) -> Estimate:
        """Return what a step takes if its largest part has rows of these lengths.

        Args:
            alone: whether the step has no other part; otherwise there are gradients before its backward pass begins.
        """
        tokens, whole = sum(lengths), self.whole(lengths)
        one_layer = whole / max(1, self.layers)
        again = recompute and self.recomputed is not None
        kept = self.recomputed(lengths) + one_layer if again and self.recomputed else whole
        budget = (CHUNK_BYTES if self.trained_head else TILE_BYTES).get(self.device, LOGITS_BYTES)
        logits = 2 * min(budget, 4 * tokens * self.vocabulary)
        logits += 3 * self.trained_head  # the head's gradient: summed, scaled, and once more
        gradients = self.trained
        if self.device == "cpu":
            plain, recomputed = HOLES[self.kind]
            activations = int(whole * plain)
            if again:
                activations = min(activations, int((kept + one_layer) * recomputed))
            if alone:  # they take the place of activations that are freed
                gradients = max(0, gradients - activations - logits)
        else:
            activations = int(kept + one_layer)
        return Estimate(
            base=self.base,
            trained=self.trained,
            gradients=gradients,
            moments=self.moments + self.workspace,
            activations=activations,
            logits=logits,
            libraries=LIBRARIES[self.kind] if self.device == "cpu" else 0,
            commit=self.copied if self.device == "cpu" else 0,
        )

    @property
    def copied(self) -> int:
        """The bytes of the copy that a commit writes in the background. It stays in main memory for the next one."""
        return self.pinned or self.trained + self.moments


@dataclass(frozen=True)
class Estimate:
    """What a step takes at its peak, in bytes, by purpose.

    Args:
        moments: with what the optimizer's step takes.
        commit: the copy of the state, on a CPU, where it lies in the same memory.
    """

    base: int
    trained: int
    gradients: int
    moments: int
    activations: int
    logits: int
    libraries: int
    commit: int

    @property
    def total(self) -> int:
        """The total."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in asdict(self).items())
        return f"{self.total / 1e9:.2f} GB at the peak of a step ({parts})"


def is_alone(part: Sequence[int], config: Config) -> bool:
    """Return whether the largest part of a step is all of it."""
    return len(part) >= config.batch_size


def largest_part(config: Config) -> list[int]:
    """Return the row lengths of the largest part that a step can have if all rows have full length."""
    tokens, length = config.part_tokens, config.max_length
    if config.gradient_accumulation != "auto":
        return [length] * -(-config.batch_size // min(config.most_parts, config.batch_size))
    share = -(-config.batch_size // min(config.parts, config.batch_size))
    return [length] * max(1, min(share, tokens // length))


PART_TOKENS = (32768, 16384, MICRO_BATCH_TOKENS, 4096, 2048)
"""Numbers of tokens that a part may have on a GPU, largest first; fewer leave a GPU idle."""


def part_tokens(profile: Profile, room: int, length: int) -> int:
    """Return the tokens of a part that fit into `room` bytes: without recomputation if possible, else with it."""
    for recompute in (False, True):
        for tokens in PART_TOKENS if not recompute else PART_TOKENS[2:]:
            if profile.estimate([length] * max(1, tokens // length), recompute=recompute).total <= room:
                return tokens
    return PART_TOKENS[-1]


def profile_of(
    model: nn.Module, method: OptimizerMethod, loss: Callable[[Batch], torch.Tensor], config: Config, device: str
) -> Profile:
    """Measure a model in a few forward passes over small rows, without changing it.

    Args:
        model: a model in training mode; its tensors need no memory (`model/outline.py`).
        method: the optimizer, which determines what is kept for each trained weight.
        loss: computes the summed loss of a part, with its graph.
    """
    recomputation = Recomputation(model)
    weights = {id(weight): weight.numel() * weight.element_size() for weight in model.parameters()}
    parameters = {name: weight for group in method.groups(model) for name, weight in group}
    sizes = [weights[id(weight)] for weight in parameters.values()]
    trained = sum(sizes)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    embedding = int(causal_lm(model).get_input_embeddings().weight.shape[0])  # type: ignore[union-attr,arg-type]
    head = causal_lm(model).get_output_embeddings()
    whole = _fit(model, loss, config.max_length)
    with recomputation.on():
        again = _fit(model, loss, config.max_length)
    is_quantized = any(map(_is_quantized, model.parameters()))
    mapped = _mapped(model) if device == "cpu" and is_quantized else 0
    return Profile(
        base=sum(weights.values()) - trained + buffers + mapped,
        trained=trained,
        moments=method.bytes(parameters),
        whole=whole,
        recomputed=again if again.token < 0.9 * whole.token else None,
        layers=max((len(part) for part in model.modules() if isinstance(part, nn.ModuleList)), default=1),
        vocabulary=embedding,
        trained_head=sum(weights[id(weight)] for weight in _trained_in(head)),
        device=device,
        kind="4-bit" if is_quantized else "adapter" if isinstance(model, PeftModel) else "full",
        workspace=method.workspace(parameters) if device == "cpu" else 0,
        pinned=pinned(sizes, method.bytes(parameters)) if device == "cuda" else 0,
    )


def pinned(weights: Sequence[int], moments: int) -> int:
    """Return the main memory for a copy from a GPU: PyTorch rounds each pinned storage up to a power of two.

    Args:
        weights: bytes of each trained weight; large ones have a storage each (`transfer/layout.py`).
        moments: bytes of the optimizer's state, which has one.
    """
    large = [size for size in weights if size > Sizes().small]
    return sum(1 << (size - 1).bit_length() for size in (*large, sum(weights) - sum(large), moments) if size)


def _is_quantized(weight: nn.Parameter) -> bool:
    return hasattr(weight, "quant_state")


def _mapped(model: nn.Module) -> int:
    """Return what the files of a model that was quantized on a CPU take beside its weights: they stay mapped, since the
    weights that are not quantized lie in them.
    """
    files = sum(file.stat().st_size for file in Path(str(causal_lm(model).name_or_path)).glob("*.safetensors"))
    plain = (each for each in model.parameters() if not each.requires_grad and not _is_quantized(each))
    return max(0, files - sum(each.numel() * each.element_size() for each in plain))


def _trained_in(head: object) -> list[nn.Parameter]:
    return [weight for weight in head.parameters() if weight.requires_grad] if isinstance(head, nn.Module) else []


def crude_of(model: nn.Module, *, padded: bool) -> Polynomial:
    """Return an upper bound of the bytes that a part keeps in usual models, without computing anything.

    Args:
        padded: whether rows are padded: then attention is the model's own, which may keep its scores.
    """
    config: Any = cast(Any, causal_lm(model).config).get_text_config()
    chosen, heads, layers = (
        getattr(config, key, None) for key in ("num_experts_per_tok", "num_attention_heads", "num_hidden_layers")
    )
    apart = (part for part in model.modules() if not isinstance(part, nn.Embedding))
    shapes = [weight.shape for part in apart for weight in part.parameters(recurse=False)]
    # GPT-2 has linear layers of its own class, and stacked experts are weights of their own
    features = sum(sum(shape) for shape in shapes if len(shape) == 2)
    features += sum((chosen or shape[0]) * sum(shape[1:]) for shape in shapes if len(shape) == 3)
    drops = any(getattr(config, key, None) for key in ("attention_dropout", "attn_pdrop"))
    scores = heads * layers if isinstance(heads, int) and isinstance(layers, int) and (padded or drops) else 0
    return Polynomial(0.0, float(CRUDE * features), float(SCORE * scores))


def fits(estimate: Estimate, usage: Usage | None) -> bool:
    """Return whether a step fits into the available memory; True if that is unknown."""
    return usage is None or estimate.total <= USABLE * usage.available


def _fit(model: nn.Module, loss: Callable[[Batch], torch.Tensor], longest: int) -> Polynomial:
    top = max(8, min(LONGEST, longest))
    lengths = [top // 2, 3 * top // 4, top]
    sizes = [float(_kept(model, partial_loss)) for partial_loss in ((lambda n=n: loss(_row(n))) for n in lengths)]
    matrix = np.array([[1.0, length, length**2] for length in lengths])
    constant, token, pair = np.linalg.solve(matrix, np.array(sizes))
    if abs(pair) * top**2 < 0.02 * sizes[-1]:  # rounding of blocks, not attention scores
        (token, constant), pair = np.polyfit(lengths, sizes, 1), 0.0
    return Polynomial(max(0.0, float(constant)), float(token), max(0.0, float(pair)))


def _row(length: int) -> Batch:
    targets = np.arange(length) > 0
    return Batch([Row(np.ones(length, dtype=np.int64), targets)], [RowReference("memory", 0)], [0])


def _kept(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that the backward pass would need from a forward pass, in addition to weights and buffers."""
    places = {_place(each) for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = _place(tensor)
        if place not in places:
            kept.setdefault(place, tensor.detach())  # held, so that no other tensor gets its memory
        return tensor.detach()  # nodes that hold their own outputs, here or in `kept`, are never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _place(tensor: torch.Tensor) -> int:
    """Return an identifier of a tensor's memory that is the same for all views, even if it has no memory."""
    return cast(Any, StorageWeakRef)(tensor.untyped_storage()).cdata
