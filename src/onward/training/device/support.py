"""What a release of PyTorch must have for what a run asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from onward.errors import ConfigError


def require_support(what: str, needed: Mapping[type[object], Sequence[str]], *, where: str, instead: str) -> None:
    """Refuse what the installed PyTorch is too old for.

    Args:
        needed: the methods that are called, by their class.
        where: the key or option that asks for it.
        instead: what to do with this PyTorch.

    Raises:
        ConfigError: a method does not exist.
    """
    missing = [f"{kind.__name__}.{name}" for kind, names in needed.items() for name in names if not hasattr(kind, name)]
    if missing:
        raise ConfigError(
            f"{what} needs a newer PyTorch: {torch.__version__} has no {' and no '.join(missing)}",
            where=where,
            hint=f"pip install -U torch, or {instead}.",
        )
