"""Restores what a forward pass may leave in a model besides gradients, so that no pass depends on an earlier one.

RoPE of kind `dynamic` keeps the frequencies of the longest sequence that it ever saw, `longrope` those of the last one;
tables of positions grow. No checkpoint contains these. Frequencies and tables are buffers; values that go with them
(the longest length seen) are plain attributes of the module that holds the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None), torch.Tensor)
SMALL = 1 << 16
"""The number of elements up to which the content of a buffer is compared."""


@dataclass(frozen=True)
class _Held:
    """One module's buffers and plain values: the objects, the buffers' content, and how often each was written to."""

    buffers: dict[str, torch.Tensor | None]
    contents: dict[str, torch.Tensor]
    versions: dict[str, int]
    values: dict[str, Any]


class Buffers:
    """A record of the current buffers of a model, and of the plain values next to them.

    Args:
        model: any model; modules without buffers are not visited again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = {module: _hold(module) for module in model.modules() if vars(module)["_buffers"]}

    def restore(self) -> None:
        """Restore everything, to the last bit; this costs next to nothing if nothing changed."""
        for module, held in self._held.items():
            for name in list(_changed_buffers(module, held)):
                _restore_buffer(module, held, name)
            for name in list(_changed_values(module, held)):
                if name in held.values:
                    vars(module)[name] = held.values[name]
                else:
                    del vars(module)[name]


def own_buffers(buffers: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Return copies of a module's buffers."""
    return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


def _hold(module: nn.Module) -> _Held:
    buffers = dict(_buffers(module))
    there = {name: buffer for name, buffer in buffers.items() if buffer is not None}
    return _Held(
        buffers=buffers,
        contents={name: buffer.detach().clone() for name, buffer in there.items()},
        versions={name: buffer._version for name, buffer in there.items()},
        values=_plain_values(module),
    )


def _buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return cast(dict[str, torch.Tensor | None], vars(module)["_buffers"])


def _plain_values(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, PLAIN) and name != "training"}


def _changed_buffers(module: nn.Module, held: _Held) -> Iterator[str]:
    now = _buffers(module)
    for name in now.keys() | held.buffers.keys():
        before, after = held.buffers.get(name), now.get(name)
        moved = after is not before or (name in now) != (name in held.buffers)
        if moved or (before is not None and _was_written(before, held, name)):
            yield name


def _was_written(buffer: torch.Tensor, held: _Held, name: str) -> bool:
    """Whether a buffer was written to; writes through `.data` are not counted, so small ones are compared."""
    content = held.contents[name]
    if buffer._version != held.versions[name] or buffer.shape != content.shape:
        return True
    return buffer.device.type == "cpu" and buffer.numel() <= SMALL and not torch.equal(buffer, content)


def _changed_values(module: nn.Module, held: _Held) -> Iterator[str]:
    now = _plain_values(module)
    for name in now.keys() | held.values.keys():
        if name not in now or name not in held.values or now[name] is not held.values[name]:
            yield name


def _restore_buffer(module: nn.Module, held: _Held, name: str) -> None:
    buffers = _buffers(module)
    if name not in held.buffers:
        del buffers[name]
        return
    buffer = buffers[name] = held.buffers[name]
    if buffer is not None:
        content = held.contents[name]
        with torch.no_grad():
            if buffer.shape != content.shape:
                buffer.data = torch.empty_like(content)
            buffer.copy_(content)
        held.versions[name] = buffer._version
