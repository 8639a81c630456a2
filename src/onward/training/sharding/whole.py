"""Assembles a whole state from shards on disk, tensor by tensor, to write a checkpoint as on one device.

Whole tensors are copied into files and mapped from there, so that the system can reclaim their memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from onward.training.layers.twin import with_weights
from onward.training.optimizers import OptimizerMethod
from onward.training.sharding.files import WEIGHT, ShardManifest
from onward.training.state import Counters, Cursor, Snapshot

TYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of types in the header of a safetensors file."""


@dataclass(frozen=True)
class Whole:
    """A whole state, mapped from files.

    Args:
        model: the model with these weights, for writing, not for computing.
        state: what was trained.
    """

    model: nn.Module
    state: Snapshot


def whole_state(
    folder: Path, manifest: ShardManifest, bare: nn.Module, method: OptimizerMethod, scratch: Path
) -> Whole:
    """Return the whole state of shards. At most one tensor and its pieces are in memory at a time.

    Args:
        folder: the shards, whose files were checked (`require_files`).
        bare: the model as it was before sharding (`ShardedModel.bare`).
        method: the optimizer's method.
        scratch: a folder for whole tensors; it must stay as long as the state is used.
    """
    names = [key.split("/", 1)[1] for key in manifest.tensors if key.startswith(f"{WEIGHT}/")]
    every = _mapped(folder, manifest, WEIGHT, names, scratch)
    slots = method.slots if manifest.count else ()
    kept = {slot: _mapped(folder, manifest, slot, manifest.trained, scratch) for slot in slots}
    held = {
        index: {method.counter: torch.tensor(float(manifest.count)), **{slot: kept[slot][name] for slot in slots}}
        for index, name in enumerate(manifest.trained if slots else ())
    }
    model = with_weights(bare, every)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in manifest.trained)
    weights = {name: every[name] for name in manifest.trained}
    frozen = sum(tensor.nbytes for name, tensor in every.items() if name not in weights)
    counters, cursor = Counters(**manifest.state["counters"]), Cursor(**manifest.state["cursor"])
    optimizer = {"state": held, "param_groups": manifest.optimizer_groups}
    return Whole(model, Snapshot(counters, cursor, weights, optimizer, method, frozen))


def _mapped(
    folder: Path, manifest: ShardManifest, kind: str, names: Sequence[str], scratch: Path
) -> dict[str, torch.Tensor]:
    """Return whole tensors of one kind by name, from a file of their own."""
    path = scratch / f"{kind}.safetensors"
    keys = [f"{kind}/{name}" for name in names]
    with ExitStack() as stack, path.open("wb") as stream:
        shards = [stack.enter_context(cast(Any, safe_open)(folder / name, "pt")) for name in sorted(manifest.files)]
        places = {key: [opened for opened in shards if key in opened.keys()] for key in keys}  # noqa: SIM118
        stream.write(_header(manifest, keys))
        for key in keys:
            for opened in places[key]:  # in the order of the ranks, which is that of the rows
                rows = cast(torch.Tensor, opened.get_tensor(key))
                stream.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    opened = cast(Any, safe_open)(path, "pt")
    return {name: opened.get_tensor(key) for name, key in zip(names, keys, strict=True)}


def _header(manifest: ShardManifest, keys: Sequence[str]) -> bytes:
    """Return the beginning of a safetensors file of these whole tensors."""
    place = 0
    entries: dict[str, Any] = {}
    for key in keys:
        shape, kind = manifest.tensors[key]
        end = place + math.prod(shape) * getattr(torch, kind).itemsize
        entries[key] = {"dtype": TYPES[kind], "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned, so that a processor reads numbers fast
    return struct.pack("<Q", len(text)) + text
