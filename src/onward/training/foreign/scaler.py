"""The loss scale that a Trainer under float16 saved."""

from __future__ import annotations

from pathlib import Path

import torch

from onward.errors import DamagedState, Unreadable, first_line
from onward.training.checkpoints.huggingface import SCALER
from onward.training.checkpoints.loading import refused_read
from onward.training.device.errors import is_of_the_device
from onward.training.loss_scale import LossScale


def read_scale(checkpoint: Path) -> LossScale:
    """Return the loss scale of a checkpoint; that of a first step if it has none.

    Raises:
        DamagedState: the file contains something else.
        Unreadable: it cannot be read now.
    """
    path = checkpoint / SCALER
    try:
        return LossScale.from_file(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        return LossScale()
    except Exception as error:  # from PyTorch's reader, or what it read
        refused = refused_read(error)
        if refused is not None:
            raise Unreadable.of(refused, path) from None
        if is_of_the_device(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DamagedState(f"this is not the state of a GradScaler: {reason}", where=path) from None
