"""Weights of the base in an adapter's file: PEFT saves embedding and head if they have an adapter.

It also does so if the vocabulary has grown, or if it cannot tell. If they equal the base's own, nothing is lost without
them. If not, they belong in a base of their own.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from onward.atomic import system_errors
from onward.errors import DamagedState, ModelError
from onward.text import quoted
from onward.training.checkpoints.huggingface import OPTIMIZER
from onward.training.foreign.folders import FRESH
from onward.training.model.adapter import ADAPTER_WEIGHTS
from onward.training.model.base import ADAPTER_CONFIG

_PREFIX = "base_model.model."
_COPY, _ORIGINAL, _LAYER = ".modules_to_save.", ".original_module.", ".base_layer."
"""Parts of names: of a module that is fully trained, of the original that it replaces, of one that has an adapter."""

Shape = tuple[int, ...]


@contextlib.contextmanager
def without_carried(checkpoint: Path, base: Path, values: Mapping[str, Any]) -> Generator[Path]:
    """Yield the checkpoint, or a copy of its adapter without weights that equal the base's.

    Args:
        values: the adapter's config.

    Raises:
        DamagedState: the adapter's weights cannot be read.
        ModelError: the adapter contains weights that the base lacks, or its embedding has another number of rows.
    """
    shapes = _shapes(checkpoint)
    carried = sorted(name for name in shapes if not _is_trained(name, values))
    _require_rows(checkpoint, base, shapes, carried)
    if not carried:
        yield checkpoint
        return
    tensors = load_file(checkpoint / ADAPTER_WEIGHTS)
    if values.get("ensure_weight_tying"):  # embedding and head are tied, and PEFT writes and reads both
        carried = [name for name in carried if not _is_other_end(name, carried, tensors)]
    for name in carried:
        if not any(torch.equal(tensors[name].float(), own.float()) for own in _likely(name, tensors, base)):
            raise _another_base(checkpoint, base, name, shapes[name][0], carried)
    with tempfile.TemporaryDirectory() as folder:
        plain = {name: tensor for name, tensor in tensors.items() if name not in carried}
        with system_errors(Path(folder)):
            save_file(plain, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(checkpoint / ADAPTER_CONFIG, Path(folder) / ADAPTER_CONFIG)
        yield Path(folder)


def _shapes(checkpoint: Path) -> dict[str, Shape]:
    path = checkpoint / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedState(f"{ADAPTER_WEIGHTS} cannot be read: {error}", where=path) from None


def _is_trained(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a tensor is trained by the adapter, by the name under which PEFT reads it."""
    if ".lora_" in name or ".trainable_tokens" in name:
        return True
    if _COPY in name or _ORIGINAL in name:
        return False
    if name.endswith(".bias") and values.get("bias") not in (None, "none"):
        return True
    parts = name.split(".")[:-1]
    whole: list[str] = list(values.get("modules_to_save") or ())
    return any(".".join(parts[:count]).endswith(saved) for saved in whole for count in range(1, len(parts) + 1))


def _is_other_end(name: str, carried: list[str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor is the same as a trained one under another name."""
    if _COPY in name or _ORIGINAL in name:
        return False
    trained = [tensor for other, tensor in tensors.items() if other not in carried and ".lora_" not in other]
    return any(torch.equal(tensors[name], tensor) for tensor in trained)


def _own_name(name: str) -> str:
    """Return the base's name for a weight."""
    return name.removeprefix(_PREFIX).replace(_ORIGINAL, ".").replace(_LAYER, ".").replace(_COPY, ".")


def _likely(name: str, tensors: Mapping[str, torch.Tensor], base: Path) -> Generator[torch.Tensor]:
    """Yield the weights that a carried one may equal: the trained one that it repeats, or those of the base."""
    if _COPY in name:
        yield from (tensors[other] for other in (name.replace(_COPY, "."),) if other in tensors)
        return
    wanted = tuple(tensors[name].shape)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for own in file.keys():  # noqa: SIM118
                if tuple(file.get_slice(own).get_shape()) == wanted:
                    yield file.get_tensor(own)


def _require_rows(checkpoint: Path, base: Path, shapes: Mapping[str, Shape], carried: list[str]) -> None:
    """Refuse weights, including trained ones, whose shape differs from that of the base's weight of that name."""
    named = {_own_name(name): name for name in shapes if ".lora_" not in name}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for own in sorted(named.keys() & set(file.keys())):
                if tuple(file.get_slice(own).get_shape()) != shapes[named[own]]:
                    raise _another_base(checkpoint, base, named[own], shapes[named[own]][0], carried)


def _another_base(checkpoint: Path, base: Path, name: str, rows: int, carried: list[str]) -> ModelError:
    """Return the refusal of an adapter on another base, with the command that makes such a base from its weights."""
    held = {_own_name(each): each for each in carried if _COPY not in each}
    tokenizer = checkpoint if (checkpoint / "tokenizer_config.json").is_file() else base
    program = (
        "from safetensors.torch import load_file; from transformers import AutoModelForCausalLM as M, AutoTokenizer; "
        f"w = load_file({str(checkpoint / ADAPTER_WEIGHTS)!r}); m = M.from_pretrained({str(base)!r}, dtype='float32'); "
        f"m.resize_token_embeddings({rows}); "
        f"m.load_state_dict({{own: w[name] for own, name in {held!r}.items()}}, strict=False); "
        f"m.save_pretrained('GROWN'); AutoTokenizer.from_pretrained({str(tokenizer)!r}).save_pretrained('GROWN')"
    )
    fresh = "" if (checkpoint / OPTIMIZER).is_file() else f" {FRESH}"
    return ModelError(
        f"the adapter contains {name}: its own embeddings or head, as after its vocabulary was extended",
        where=checkpoint / ADAPTER_WEIGHTS,
        hint=f"Put them into a copy of the base: python -c {quoted(program)}; then: "
        f"onward adopt {quoted(checkpoint)} --run NEW_RUN --model GROWN{fresh}",
    )
