"""What a GPU's recording does, on a CPU: the same operations on the same memory, without the code that called them.

Whatever a computation reads in Python while it is recorded stays as it was, as in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Record(TorchDispatchMode):
    """Keeps every operation with its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not _is_view(func):
            results = [] if _writes(func) else _tensors(found)
            kept = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, results))  # no graph is held
            self.operations.append((func, *kept))
        return found


class OpRecorder:
    """Records computations; counts recordings, replays and operations."""

    def __init__(self) -> None:
        self.recorded = self.replays = self.operations = 0

    def __call__(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """Record."""
        with _Record() as record:
            result = compute()
        self.recorded += 1

        def replay() -> Any:
            self.replays += 1
            self.operations += len(record.operations)
            with torch.no_grad():
                for func, args, kwargs, results in record.operations:
                    found = func(*args, **kwargs)
                    for target, now in zip(results, _tensors(found) if results else [], strict=True):
                        target.copy_(now)
            return result

        return replay


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _writes(func: Any) -> bool:
    return any(each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments)


def _is_view(func: Any) -> bool:
    infos = [each.alias_info for each in func._schema.returns]
    return not _writes(func) and any(each is not None for each in infos)
