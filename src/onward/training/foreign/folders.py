"""The content of another tool's checkpoint folder: step, weights, optimizer's file, or why it cannot be adopted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from onward.errors import UsageError
from onward.layout import MANIFEST, RunLayout
from onward.text import printable, quoted
from onward.training.checkpoints.huggingface import OPTIMIZER, TRAINER_STATE
from onward.training.model.adapter import ADAPTER_WEIGHTS
from onward.training.model.base import ADAPTER_CONFIG, FSDP_WEIGHTS

FULL_OPTIMIZER = "optimizer.bin"
"""The whole optimizer state by parameter name, as FSDP's full state dict is saved."""
FRESH = "--fresh-moments"
MERGE = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
"""The command that makes one file of shards."""
MODEL_WEIGHTS = "model.safetensors"
"""The file of a whole model, which tools that join shards write for an adapter too."""
_WHOLE = ("model*.safetensors", "pytorch_model.bin*", "pytorch_model-*.bin", ADAPTER_WEIGHTS, "adapter_model.bin")


@dataclass(frozen=True)
class TrainerFolder:
    """A checkpoint folder that can be adopted.

    Args:
        optimizer: the file with the optimizer's state; None if moments start afresh.
        state: the content of `trainer_state.json`; empty if there is none.
    """

    path: Path
    optimizer: Path | None
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The number of steps that the Trainer had taken; 1 if unknown."""
        return int(self.state["global_step"]) if self.state else 1

    @property
    def total_steps(self) -> int:
        """The number of steps that the Trainer was set to take in all; 0 if unknown."""
        steps = self.state.get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else 0

    @property
    def batch_rows(self) -> int | None:
        """Rows of one batch of one process: `train_batch_size` in the Trainer's state."""
        rows = self.state.get("train_batch_size")
        return rows if isinstance(rows, int) and rows > 0 else None


def open_folder(path: Path, *, fresh: bool) -> TrainerFolder:
    """Open a checkpoint folder.

    Args:
        fresh: whether to ignore the optimizer's state.

    Raises:
        UsageError: this is not a checkpoint, or its state cannot be read as it is; the hint says what to do.
    """
    if not path.is_dir():
        raise UsageError("there is no such checkpoint directory", where=path)
    below = _newest_checkpoint(path)
    made = below or _newest_checkpoint(RunLayout(path).current)
    if made is not None and (made / MANIFEST).is_file():
        hint = f"The run's checkpoint: onward adopt {quoted(made)} --run NEW_RUN"
        raise UsageError("this is a run of Onward or its current_model, not a checkpoint", where=path, hint=hint)
    found = next((name for name in (OPTIMIZER, FULL_OPTIMIZER) if (path / name).is_file()), None)
    if found is None and not fresh and below is not None:
        raise _without_optimizer(path)
    _require_weights(path)
    if fresh:
        return TrainerFolder(path, None, _read_state(path) if (path / TRAINER_STATE).is_file() else {})
    if found is None:
        raise _without_optimizer(path)
    return TrainerFolder(path, path / found, _read_state(path))


def fresh_command(path: Path) -> str:
    """Return the command that continues from a checkpoint's weights alone."""
    return f"onward adopt {quoted(path)} --run NEW_RUN {FRESH}"


def fresh_hint(path: Path) -> str:
    """Return the remedy that works for every checkpoint with readable weights."""
    return f"To start from its weights only, with fresh moments: {fresh_command(path)}"


def _read_state(path: Path) -> Mapping[str, Any]:
    try:
        values = cast(dict[str, Any], json.loads((path / TRAINER_STATE).read_bytes()))
        return {**values, "global_step": int(values["global_step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"trainer_state.json cannot be read: {type(error).__name__}", where=path,
            hint=f"Name a checkpoint-N directory that transformers' Trainer wrote. {fresh_hint(path)}",
        ) from None  # fmt: skip


def _require_weights(path: Path) -> None:
    """Refuse a folder without whole weights, with the command that merges or renames them.

    Raises:
        UsageError: they are in shards, empty, in folders below, under other names, or nowhere.
    """
    whole = [file for pattern in _WHOLE for file in sorted(path.glob(pattern))]
    if any(map(_is_emptied, whole)):
        raise _emptied(path)
    if _is_of_lora(path / MODEL_WEIGHTS):
        raise _adapter_as_model(path)
    if not whole:
        raise _in_folders(path) or _merged_first(path) or _named_otherwise(path)
    if not ((path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file()):
        hint = f"Copy it from the model that it was made from: cp BASE/config.json {quoted(path)}; then adopt again."
        raise UsageError("there is no config.json next to the weights", where=path, hint=hint)


def _in_folders(path: Path) -> UsageError | None:
    """Return the refusal of a folder whose adapters are in folders of their own; None for any other."""
    named = sorted(folder for folder in path.glob("*/") if (folder / ADAPTER_CONFIG).is_file())
    if not named:
        return None
    names = ", ".join(printable(folder.name) for folder in named)
    if not any((path / name).is_file() for name in (OPTIMIZER, FULL_OPTIMIZER)):  # such as torchtune's epochs
        hint = f"Name one of them: {fresh_command(named[-1])}"
        return UsageError(f"its adapters are in folders: {names}", where=path, hint=hint)
    command = f"cp {quoted(named[0])}/* {quoted(path)}"
    hint = f"Copy the one that was trained next to {OPTIMIZER}: {command}; then adopt again."
    return UsageError(f"its adapter has its own name, and a folder: {names}", where=path, hint=hint)


def _merged_first(path: Path) -> UsageError | None:
    """Return the refusal of weights that a command of the tool that wrote them makes whole; None for any others."""
    if _is_deepspeed(path):
        return _in_shards("DeepSpeed", path, _joining(path, path))
    whole = path / FSDP_WEIGHTS
    if whole.is_file():
        hint = f"cp {quoted(whole)} {quoted(path / 'pytorch_model.bin')}; then adopt again."
        return UsageError("FSDP saved the weights under a different name", where=whole, hint=hint)
    shards = sorted(path.glob("pytorch_model_fsdp_*/"))
    if shards:
        return _in_shards("FSDP", path, f"accelerate merge-weights {quoted(shards[0])} {quoted(path)}")
    if next(path.glob("*.distcp"), None):
        command = f"{MERGE} {quoted(path)} FILE.pt, and save_pretrained of the model with what is in it"
        return _in_shards("torch.distributed.checkpoint", path, command)
    return None


def _joining(path: Path, target: Path) -> str:
    """Return the command that joins DeepSpeed's shards: the script that lies beside them, or that of its package."""
    beside = path / "zero_to_fp32.py"
    script = quoted(beside) if beside.is_file() else "-m deepspeed.utils.zero_to_fp32"
    return f"python {script} --safe_serialization {quoted(path)} {quoted(target)}"


def _named_otherwise(path: Path) -> UsageError:
    """Return the refusal of weights whose names transformers does not read, or of a folder without any."""
    if next(path.glob("*_model_states.pt"), None):
        hint = f"Name the folder above it: onward adopt {quoted(path.absolute().parent)} --run NEW_RUN"
        return UsageError("these are DeepSpeed's shards, not the checkpoint", where=path, hint=hint)
    others = [printable(file.name) for file in sorted(path.glob("*.safetensors"))]
    names = "model.safetensors, or model-00001-of-0000N.safetensors with model.safetensors.index.json"
    if others:
        what, hint = f"transformers does not read weights of this name: {others[0]}", f"Rename them: {names}."
    else:
        what, hint = "there are no weights", f"Name a folder with {names}, or with {ADAPTER_WEIGHTS}."
    return UsageError(what, where=path, hint=hint)


def _is_emptied(file: Path) -> bool:
    """Whether a file's tensors are without numbers; one that is damaged is reported later."""
    shapes = _shapes(file)
    return bool(shapes) and all(0 in shape for shape in shapes.values())


def _is_of_lora(file: Path) -> bool:
    """Whether a file has the weights of a LoRA adapter and none of its base."""
    names = _shapes(file)
    return any(".lora_" in name for name in names) and not any(".base_layer." in name for name in names)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes of a file's tensors by name; none if it is damaged, or of another kind."""
    if file.suffix == ".safetensors":
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="pt") as opened:
            names: list[str] = list(opened.keys())
            return {name: opened.get_slice(name).get_shape() for name in names}
    return {}


def _adapter_as_model(path: Path) -> UsageError:
    """Return the refusal of an adapter in the file of a model, as accelerate joins FSDP's shards."""
    hint = f"Rename them: mv {quoted(path / MODEL_WEIGHTS)} {quoted(path / ADAPTER_WEIGHTS)}; then adopt again."
    if not (path / ADAPTER_CONFIG).is_file():
        hint += f" {ADAPTER_CONFIG} goes beside them: LoraConfig(...).save_pretrained({str(path)!r}) of PEFT writes it."
    return UsageError(f"{MODEL_WEIGHTS} has the weights of an adapter", where=path, hint=hint)


def _emptied(path: Path) -> UsageError:
    """Return the refusal of weights of which DeepSpeed's third stage left only the names."""
    hint = (
        "DeepSpeed kept them in its shards. Resume there with stage3_gather_16bit_weights_on_model_save: true and save "
        "again, then adopt that."
    )
    return UsageError("its weights are without numbers", where=path, hint=hint)


def _in_shards(tool: str, path: Path, command: str) -> UsageError:
    has_moments = (path / FULL_OPTIMIZER).is_file() or next(path.glob("optimizer_*/"), None)  # FSDP's
    then = "then adopt again" if has_moments else f"then: {fresh_command(path)}"
    what = f"{tool} wrote the weights of this checkpoint in shards"
    return UsageError(what, where=path, hint=f"Merge them: {command}; {then}")


def _without_optimizer(path: Path) -> UsageError:
    """Return the refusal of a folder without a readable optimizer file."""
    sharded = next(iter(sorted(path.glob("optimizer_*/"))), None)
    if sharded is not None and next(sharded.glob("*.distcp"), None):
        command = f"{MERGE} {quoted(sharded)} {quoted(path / FULL_OPTIMIZER)}"
        return UsageError(
            "FSDP wrote the optimizer's state in shards",
            where=sharded,
            hint=f"Merge it: {command}; then adopt again. {fresh_hint(path)}",
        )
    if _is_deepspeed(path):
        return UsageError("DeepSpeed keeps the moments in its own shards", where=path, hint=fresh_hint(path))
    what = "the checkpoint has no optimizer.pt, so there are no moments to continue with"
    inner = _newest_checkpoint(path)
    if inner is not None:
        return UsageError(what, where=path, hint=f"Its newest checkpoint: onward adopt {quoted(inner)} --run NEW_RUN")
    return UsageError(what, where=path, hint=f"Name a checkpoint-N directory of Trainer. {fresh_hint(path)}")


def _newest_checkpoint(path: Path) -> Path | None:
    """Return the newest checkpoint below a Trainer's output folder."""
    found = {folder: folder.name.rpartition("-")[2] for folder in path.glob("checkpoint-*/")}
    return max((folder for folder in found if found[folder].isdigit()), key=lambda one: int(found[one]), default=None)


def _is_deepspeed(path: Path) -> bool:
    return (path / "zero_to_fp32.py").is_file() or next(path.glob("global_step*/"), None) is not None
