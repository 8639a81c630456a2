"""Checkpoints: a TrainState as a Hugging Face directory with a manifest, written whole, verified before use.

A directory without a manifest whose digest and file hashes hold does not exist as a checkpoint. The commit is the
rename in `write_checkpoint`, as in Orbax and Levanter.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from onward.atomic import TEMPORARY_PREFIX, fsync_file, publish_directory, remove_tree, write_file
from onward.config import Config
from onward.digest import canonical_json, sha256_json, xxh3_file
from onward.errors import DamagedState, NoSpace
from onward.training import huggingface
from onward.training.handover import Measurement
from onward.training.model import build_model, save_weights
from onward.training.optim import apply_config, build_optimizer
from onward.training.state import Cursor, Snapshot, TrainState

FORMAT = 1
MANIFEST = "onward.json"
SPACE_MARGIN = 1.1


class Manifest(BaseModel):
    """What `onward.json` says of the checkpoint beside it. `digest` covers every other field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    run: str
    step: int
    state: dict[str, Any]
    measurement: dict[str, Any]
    config: dict[str, Any]
    identity: str
    base: dict[str, str]
    tokenizer: str
    environment: dict[str, Any]
    parameters: dict[str, list[Any]]
    files: dict[str, dict[str, Any]]
    parent: dict[str, Any] | None
    digest: str = ""

    @property
    def cursor(self) -> Cursor:
        """Where in the stream the checkpoint stands."""
        return Cursor(**self.state["cursor"])

    @property
    def state_digest(self) -> str:
        """One digest for weights, moments and Adam's counter together."""
        return Measurement(**self.measurement).state_digest

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(int(entry["size"]) for entry in self.files.values())

    def sealed(self) -> Manifest:
        """Return the manifest with its digest."""
        return self.model_copy(update={"digest": sha256_json(self.model_dump(mode="json", exclude={"digest"}))})


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says beyond the state: the run it belongs to and what it was made with."""

    run: str
    base: dict[str, str]
    tokenizer: str
    environment: Mapping[str, Any]
    static_files: Mapping[str, bytes]
    """Files that are the same in every checkpoint (tokenizer, training arguments), by name."""


def write_checkpoint(
    target: Path,
    model: nn.Module,
    state: Snapshot,
    config: Config,
    measurement: Measurement,
    facts: Facts,
    log_history: Sequence[dict[str, Any]],
    parent: Manifest | None,
) -> Manifest:
    """Write a checkpoint directory and commit it by one rename.

    Args:
        model: gives names and configuration of what is saved; its weights may have moved on.

    Raises:
        NoSpace: the disk has no room; nothing is left behind and earlier checkpoints are untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, estimate_size(state, facts))
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    remove_tree(temporary)
    temporary.mkdir()
    try:
        _write_files(temporary, model, state, config, facts, log_history)
        manifest = _describe(temporary, state, config, measurement, facts, parent)
        write_file(temporary / MANIFEST, canonical_json(manifest.model_dump(mode="json")) + b"\n")
        remove_tree(target)  # only ever a directory that did not verify, or a replayed step
        publish_directory(temporary, target)
    except OSError as error:
        remove_tree(temporary)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(target.parent, estimate_size(state, facts)) from None
        raise
    return manifest


def estimate_size(state: Snapshot, facts: Facts) -> int:
    """Return the bytes that the next checkpoint needs: weights, two moments, the static files."""
    return state.size + sum(len(data) for data in facts.static_files.values()) + (1 << 16)


def require_space(folder: Path, size: int) -> None:
    """Refuse to begin a checkpoint that does not fit.

    Raises:
        NoSpace: fewer than `size` bytes and a margin are free.
    """
    if shutil.disk_usage(folder).free < size * SPACE_MARGIN:
        raise _no_space(folder, size)


def _no_space(folder: Path, size: int) -> NoSpace:
    free = shutil.disk_usage(folder).free
    return NoSpace(
        f"the next checkpoint needs {size / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
        where=folder,
        hint="Free some space (lower keep_boundaries, or move the run), then: onward train. The last commit is whole.",
    )


def _write_files(
    folder: Path,
    model: nn.Module,
    state: Snapshot,
    config: Config,
    facts: Facts,
    log_history: Sequence[dict[str, Any]],
) -> None:
    save_weights(model, state.weights, folder)
    huggingface.save(state.optimizer, folder / huggingface.OPTIMIZER)
    huggingface.save(huggingface.scheduler_state(state, config), folder / huggingface.SCHEDULER)
    huggingface.save(huggingface.random_state(config, state.step), folder / huggingface.RNG)
    (folder / huggingface.TRAINER_STATE).write_bytes(huggingface.trainer_state(state, config, log_history))
    for name, data in facts.static_files.items():
        (folder / name).write_bytes(data)
    for path in folder.iterdir():
        fsync_file(path)


def _describe(
    folder: Path, state: Snapshot, config: Config, measurement: Measurement, facts: Facts, parent: Manifest | None
) -> Manifest:
    files = {
        path.name: {"size": path.stat().st_size, "xxh3": xxh3_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    return Manifest(
        format=FORMAT,
        run=facts.run,
        step=state.step,
        state=state.plain(),
        measurement=measurement.to_dict(),
        config=config.recorded(),
        identity=sha256_json(config.identity()),
        base=facts.base,
        tokenizer=facts.tokenizer,
        environment=dict(facts.environment),
        parameters=state.describe_parameters(),
        files=files,
        parent={"step": parent.step, "digest": parent.digest} if parent else None,
    ).sealed()


def inspect_checkpoint(folder: Path) -> tuple[Manifest | None, list[str]]:
    """Check a checkpoint's manifest and the hash of every file; returns the manifest and what is wrong."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None, [f"{MANIFEST} is missing"]
    except (OSError, ValidationError):
        return None, [f"{MANIFEST} cannot be read"]
    if manifest.sealed().digest != manifest.digest:
        return None, [f"{MANIFEST} was changed"]
    if manifest.format != FORMAT:
        return None, [f"{MANIFEST} has format {manifest.format}, this release knows {FORMAT}"]
    problems = [problem for name, entry in manifest.files.items() if (problem := _check_file(folder / name, entry))]
    return manifest, problems


def _check_file(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{path.name} has {size} bytes instead of {entry['size']}"
        return None if xxh3_file(path) == entry["xxh3"] else f"{path.name} was changed (its hash differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {os.strerror(error.errno or 0)}"


def load_state(
    folder: Path, manifest: Manifest, config: Config, base: Path, device: torch.device, dtype: torch.dtype
) -> TrainState:
    """Build the TrainState that a verified checkpoint holds.

    Raises:
        DamagedState: names, shapes or types are not those of the manifest.
    """
    model = build_model(config, base, device, dtype, checkpoint=folder)
    state = TrainState(model, build_optimizer(model, config))
    if state.view().describe_parameters() != manifest.parameters:
        raise DamagedState("the model's trained parameters are not those of the checkpoint", where=folder)
    load_moments(state, folder / huggingface.OPTIMIZER)
    apply_config(state.optimizer, config)
    state.load_plain(manifest.state)
    return state


def load_moments(state: TrainState, path: Path) -> None:
    """Load AdamW's moments from an `optimizer.pt`, checked by parameter: count, names, shapes.

    Raises:
        DamagedState: the file does not hold AdamW moments for exactly these parameters.
    """
    try:
        saved = cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True))
        order = [index for group in saved["param_groups"] for index in group["params"]]
        moments = cast(dict[int, dict[str, torch.Tensor]], saved["state"])
        rates = [float(group["lr"]) for group in saved["param_groups"]]
    except Exception as error:
        raise DamagedState(f"the optimizer's state cannot be read: {type(error).__name__}", where=path) from None
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    expected = [len(group["params"]) for group in state.optimizer.param_groups]
    if sizes != expected:
        raise DamagedState(f"the optimizer has parameter groups of {sizes}, the model of {expected}", where=path)
    for index, (name, parameter) in zip(order, state.parameters.items(), strict=True):
        _check_moments(name, parameter, moments.get(index), bool(moments), path)
    groups = state.optimizer.state_dict()["param_groups"]
    for group, rate, saved_group in zip(groups, rates, saved["param_groups"], strict=True):
        group.update(lr=rate, params=saved_group["params"])
    owned = {index: {key: value.clone() for key, value in entry.items()} for index, entry in moments.items()}
    state.optimizer.load_state_dict({"state": owned, "param_groups": groups})


def _check_moments(
    name: str, parameter: torch.Tensor, entry: dict[str, torch.Tensor] | None, wanted: bool, path: Path
) -> None:
    if entry is None and not wanted:
        return
    if entry is None or set(entry) != {"step", "exp_avg", "exp_avg_sq"}:
        raise DamagedState(f"the optimizer holds no AdamW moments for {name}", where=path)
    for key in ("exp_avg", "exp_avg_sq"):
        if entry[key].shape != parameter.shape:
            shapes = f"{tuple(entry[key].shape)}, the parameter {tuple(parameter.shape)}"
            raise DamagedState(f"the moment {key} of {name} has shape {shapes}", where=path)
