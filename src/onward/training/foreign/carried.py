"""Weights of the base that an adapter's file carries: PEFT saves embedding and head where an adapter lies on them.

Where they are the base's own, nothing is lost without them. Where they are not, the vocabulary has grown, or they were
trained.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from onward.errors import DamagedState, ModelError
from onward.training.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from onward.training.model.adapter_config import merge_hint

WITH_WEIGHTS = ("modules_to_save", "trainable_token_indices", "bias")
"""Fields of an adapter that say that its file holds more than matrices."""


@contextlib.contextmanager
def without_carried(checkpoint: Path, base: Path, values: Mapping[str, Any]) -> Generator[Path]:
    """Yield the checkpoint, or a copy of its adapter without weights that are the base's own.

    Args:
        values: what the adapter's config says.

    Raises:
        DamagedState: the adapter's weights cannot be read.
        ModelError: the adapter carries weights that the base does not have.
    """
    carried = (
        [] if any(values.get(name) not in (None, [], {}, "none") for name in WITH_WEIGHTS) else _carried(checkpoint)
    )
    if not carried:
        yield checkpoint
        return
    tensors = load_file(checkpoint / ADAPTER_WEIGHTS)
    for name in carried:
        if not any(torch.equal(tensors[name].float(), own.float()) for own in _of_shape(base, tensors[name].shape)):
            raise ModelError(
                f"the adapter carries {name}: embeddings or a head of its own, as after its vocabulary has grown",
                where=checkpoint / ADAPTER_WEIGHTS,
                hint=merge_hint(checkpoint, values),
            )
    with tempfile.TemporaryDirectory() as folder:
        plain = {name: tensor for name, tensor in tensors.items() if name not in carried}
        save_file(plain, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        shutil.copyfile(checkpoint / ADAPTER_CONFIG, Path(folder) / ADAPTER_CONFIG)
        yield Path(folder)


def _carried(checkpoint: Path) -> list[str]:
    path = checkpoint / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(name for name in file.keys() if ".lora_" not in name)  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedState(f"{ADAPTER_WEIGHTS} cannot be read: {error}", where=path) from None


def _of_shape(base: Path, shape: Iterable[int]) -> Generator[torch.Tensor]:
    """Yield the base's weights of a shape."""
    wanted = list(shape)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if list(file.get_slice(name).get_shape()) == wanted:
                    yield file.get_tensor(name)
