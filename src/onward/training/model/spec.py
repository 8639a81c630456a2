"""What a model is built from, and the record of the environment in which it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from onward.config import Config
from onward.training.device.environment import NUMERICS, describe_environment
from onward.training.layers.facts import layer_facts
from onward.training.model.libraries import library_facts


@dataclass(frozen=True)
class ModelSpec:
    """What decides how the model of a run is built.

    Args:
        config: its method, adapter and seed.
        base: folder of the base model.
        device: the device on which it computes.
        dtype: compute type.
    """

    config: Config
    base: Path
    device: torch.device
    dtype: torch.dtype


def environment_of(
    spec: ModelSpec, numerics: int = NUMERICS, *, ranks: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the record of the environment in which a model computes.

    Args:
        numerics: the number of the way in which its steps are computed.
        ranks: what keeps several processes from computing the same bits as one.
    """
    layers = {**layer_facts(spec.device, spec.dtype), **library_facts(spec.base, spec.config)}
    exact = spec.config.deterministic
    return describe_environment(spec.device, spec.dtype, numerics, exact=exact, layers=layers, ranks=ranks)
