"""The arguments that a Trainer had: `training_args.bin`, read as plain values, never unpickled."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from onward.errors import Unreadable
from onward.training.checkpoints.huggingface import TRAINING_ARGUMENTS
from onward.training.foreign.pickles import Inert, NotAPickle, read_saved

_RANDOM_STATES = "rng_state_*.pth"
"""One file per process, if there were several."""
_SHARED_ROWS = ("tp_size", "cp_size", "sp_size")
"""How many processes share a tensor, a context or a sequence, so the same rows (accelerate's `ParallelismConfig`)."""
_NUMBERS = re.compile(r"[biuf]\d")
"""NumPy's names of types of numbers."""


@dataclass(frozen=True)
class Arguments:
    """A Trainer's arguments.

    Args:
        values: its arguments by name: numbers, strings, lists, and values of enumerations.
        processes: how many processes trained on rows of their own, as far as the checkpoint shows.
        missing: why there are no arguments; empty if there are.
    """

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    processes: int = 1
    missing: str = ""

    def number(self, name: str, default: float) -> float:
        """Return a number among the arguments, or the default if it is not a number."""
        value = self.values.get(name)
        return default if isinstance(value, bool) or not isinstance(value, (int, float)) else value

    def count(self, name: str) -> int:
        """Return a number of things, at least 1."""
        return max(1, int(self.number(name, 1)))

    def text(self, name: str) -> str:
        """Return a string among the arguments, or ""."""
        value = self.values.get(name)
        return value if isinstance(value, str) else ""

    def warmup_steps(self, total_steps: int) -> int:
        """Return the warmup steps: a count, or a share of all steps (under a key of its own before transformers 5)."""
        steps = self.number("warmup_steps", 0)
        if steps >= 1:
            return int(steps)
        return math.ceil(total_steps * (steps or self.number("warmup_ratio", 0)))


def read_arguments(checkpoint: Path) -> Arguments:
    """Return the arguments in a checkpoint or, if none can be read, the reason.

    Raises:
        Unreadable: the file exists but cannot be read now.
    """
    path = checkpoint / TRAINING_ARGUMENTS
    try:
        saved = read_saved(path)
    except FileNotFoundError:
        return Arguments(missing=f"{TRAINING_ARGUMENTS} is missing", processes=_processes(checkpoint, {}))
    except OSError as error:
        raise Unreadable.of(error, path) from None
    except NotAPickle as error:
        return Arguments(missing=f"{TRAINING_ARGUMENTS} cannot be read: {error}", processes=_processes(checkpoint, {}))
    state = saved.state if isinstance(saved, Inert) else saved
    if not isinstance(state, dict):
        return Arguments(missing=f"{TRAINING_ARGUMENTS} holds no arguments", processes=_processes(checkpoint, {}))
    values = {str(name): _plain(value) for name, value in cast(dict[Any, Any], state).items()}
    return Arguments(values, _processes(checkpoint, state))


def _plain(value: Any) -> Any:
    """Return a value without its class: the value of an enumeration's member, the fields of an object."""
    if not isinstance(value, Inert):
        return value
    if isinstance(value.state, dict):
        return cast(dict[str, Any], value.state)
    if value.name.endswith("multiarray.scalar"):
        return _number_of_numpy(value)
    words = [argument for argument in value.arguments if isinstance(argument, (str, int, float))]
    member = value.name.rpartition(".")[2] == "getattr"  # a member by name, as Python 3.11 pickled some
    return str(words[-1]).lower() if words and member else (words[-1] if words else value.name)


def _number_of_numpy(value: Inert) -> Any:
    """Return a number that was pickled as one of NumPy's, or the name of its class if it is none."""
    try:
        kind, data = value.arguments
        if not isinstance(data, bytes):  # pickles of protocol 2, as PyTorch's, have text in place of bytes
            data = str(data.arguments[0]).encode("latin1")
        if _NUMBERS.fullmatch(kind.arguments[0]):
            return np.frombuffer(data, np.dtype(kind.arguments[0]).newbyteorder(kind.state[1]))[0].item()
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    return value.name


def _processes(checkpoint: Path, state: Mapping[Any, Any]) -> int:
    """Return how many processes had rows of their own.

    As many trained as are recorded, or as left the state of their random generators; some may have shared their rows.
    """
    said = _fields(state, "distributed_state").get("num_processes")
    left = sum(path.stem.removeprefix("rng_state_").isdigit() for path in checkpoint.glob(_RANDOM_STATES))
    sizes = [_fields(state, "parallelism_config").get(name) for name in _SHARED_ROWS]
    together = math.prod(size for size in sizes if isinstance(size, int) and size > 0)
    return max(1, max(left, said if isinstance(said, int) else 1) // together)


def _fields(state: Mapping[Any, Any], name: str) -> Mapping[str, Any]:
    """Return the fields of an object among the arguments; none if it is not one."""
    held = _plain(state.get(name))
    return cast(dict[str, Any], held) if isinstance(held, dict) else {}
