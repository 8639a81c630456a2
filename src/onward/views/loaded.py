"""A committed state of a run in memory for inference: the model, and how to prompt it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from onward.config import Config
from onward.config.text import read_config
from onward.data.templates.own_template import read_template
from onward.data.tokenizer import TokenizerState
from onward.errors import ModelError
from onward.layout import RunLayout
from onward.service.holder import is_held
from onward.service.tokenizer import load_tokenizer_of
from onward.store.ledger import Ledger
from onward.training.device.environment import pick_device, pick_dtype
from onward.training.model.base import ADAPTER_CONFIG, TOKENIZER, base_of_run, digest_base
from onward.training.model.load import fits_shape, load_model
from onward.views.points import Point


@dataclass(frozen=True)
class Loaded:
    """A state in memory.

    Args:
        model: frozen, in evaluation mode.
        tokenizer: the run's tokenizer, with its chat template.
        label: which state it is, in words.
        step: its global step; None for a release that does not record it.
        base: the base model of an adapter, and its digest; None for a full model.
    """

    model: nn.Module = field(repr=False)
    tokenizer: TokenizerState = field(repr=False)
    label: str
    step: int | None
    base: Base | None


@dataclass(frozen=True)
class Base:
    """The base model of a run on disk: its folder, and its digest there."""

    folder: Path
    digest: str


def load(layout: RunLayout, point: Point, *, device: torch.device | None = None, known: Base | None = None) -> Loaded:
    """Load a state that is held, for inference.

    Args:
        device: where to run it; None for `free_device`.
        known: a base whose digest was computed already.

    Raises:
        ModelError: the base is missing or is not the one that the state was trained on, or a file is damaged.
        Unreadable: a file of the model cannot be read now.
    """
    config = read_config(layout.config)
    device = free_device(layout) if device is None else device
    base = base_of_point(layout, config, point, known) if has_adapter(point) else None
    model = load_model(point.folder, point.folder if base is None else base.folder, device, dtype_of(config, device))
    return Loaded(model, tokenizer_of(layout, config, point), point.label, point.step, base)


def exchanged(layout: RunLayout, point: Point, loaded: Loaded) -> Loaded | None:
    """Return another state of the same model, whose adapter has yet to be put into it; None if the model differs.

    Raises:
        ModelError: the base on disk is not the one that the state was trained on.
    """
    if loaded.base is None or not has_adapter(point) or not fits_shape(loaded.model, point.folder):
        return None
    config = read_config(layout.config)
    if base_of_point(layout, config, point, loaded.base) != loaded.base:
        return None
    return Loaded(loaded.model, tokenizer_of(layout, config, point), point.label, point.step, loaded.base)


def has_adapter(point: Point) -> bool:
    """Return whether a state is an adapter for a base; otherwise it is a full model."""
    return (point.folder / ADAPTER_CONFIG).is_file()


def free_device(layout: RunLayout) -> torch.device:
    """Return the GPU if there is one on which no process trains this run, else the CPU.

    Another model next to the one in training could take the memory that the next step needs.
    """
    return torch.device("cpu") if is_held(layout.lock) else pick_device()


def dtype_of(config: Config, device: torch.device) -> torch.dtype:
    """Return the type that the run's config asks for on a device."""
    return pick_dtype(config.dtype, device)


def base_of_point(layout: RunLayout, config: Config, point: Point, known: Base | None = None) -> Base:
    """Return the base that a state's adapter was trained on, once its digest is found to be the same.

    Raises:
        ModelError: it is missing, or its files differ.
    """
    folder = base_of_run(layout.root, config.model)
    digest = known.digest if known is not None and known.folder == folder else digest_base(folder)
    if point.manifest is not None:
        expected = point.manifest.base["digest"]
    else:
        with Ledger(layout.ledger, read_only=True) as ledger:
            expected = (ledger.get("identity") or {}).get("base")
    if digest != expected:
        raise ModelError(
            "the base model on disk is not the one on which this adapter was trained",
            where=folder,
            hint="Restore the original files.",
        )
    return Base(folder, digest)


def tokenizer_of(layout: RunLayout, config: Config, point: Point) -> TokenizerState:
    """Return a state's own tokenizer or else the run's, with the run's chat template.

    Raises:
        ModelError: there is none, or it cannot be used.
    """
    if any((point.folder / name).is_file() for name in TOKENIZER):
        return load_tokenizer_of(point.folder)
    folder = layout.tokenizer(base_of_run(layout.root, config.model))
    return load_tokenizer_of(folder).with_template(read_template(config.chat_template, layout.root))
