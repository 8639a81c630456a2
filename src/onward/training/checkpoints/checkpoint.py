"""Checkpoints on disk: Hugging Face directories with a manifest, written whole, verified before use.

A directory is a checkpoint only if its manifest, with the hash of every file, is correct. The commit is the rename in
`write_checkpoint`, as in Orbax and Levanter.
"""

from __future__ import annotations

import errno
import shutil
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from onward.atomic import (
    TEMPORARY_PREFIX,
    discard_tree,
    fsync_file,
    publish_directory,
    remove_tree,
    why_less,
    write_file,
)
from onward.config import Config
from onward.digest import canonical_json, sha256_json, xxh3_file
from onward.errors import NEWER_RELEASE, NoSpace, NotMadeHere, Unreadable, VerificationFailed, is_out_of_space
from onward.layout import MANIFEST
from onward.stated import NO_SUCH_FILE, read_manifest
from onward.training.checkpoints import huggingface
from onward.training.measuring.handover import GRADIENT, Measurement
from onward.training.model.roundtrip import prove_roundtrip
from onward.training.model.weights import save_weights
from onward.training.state import Cursor, Snapshot
from onward.training.transfer import beside_training

FORMAT = 1
SPACE_MARGIN = 1.1
SMALL_FILES = 1 << 16
"""Bytes reserved for the manifest, the configs and everything else that is not weights, moments or static files."""


class Manifest(BaseModel):
    """The content of `onward.json`. `digest` covers every other field."""

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
    probe_gradient: str = ""
    digest: str = ""

    @property
    def measured(self) -> dict[str, Any]:
        """Everything that was measured of the state, as `Measurement.to_dict` returns it."""
        return {**self.measurement, GRADIENT: self.probe_gradient}

    @property
    def cursor(self) -> Cursor:
        """The checkpoint's place in the stream."""
        return Cursor(**self.state["cursor"])

    @property
    def state_digest(self) -> str:
        """One digest of weights, moments and the optimizer's counter together."""
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
    """What a checkpoint records besides the state: the run it belongs to and what it was made with."""

    run: str
    base: dict[str, str]
    tokenizer: str
    environment: Mapping[str, Any]
    static_files: Mapping[str, bytes]
    """Files that are the same in every checkpoint (the tokenizer's), by name."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is written from.

    Args:
        model: provides the names and the configuration of what is saved; its weights may have changed since.
        state: the state to save.
        config: the config in force.
        measurement: what was measured of the state.
        log_history: entries for `trainer_state.json`.
        parent: the previous checkpoint.
    """

    model: nn.Module
    state: Snapshot
    config: Config
    measurement: Measurement
    facts: Facts
    log_history: Sequence[dict[str, Any]] = ()
    parent: Manifest | None = None


def write_checkpoint(target: Path, contents: Contents, *, recorded: bool = False) -> Manifest:
    """Write a checkpoint directory and commit it by one rename.

    Args:
        recorded: whether the ledger has a record of an earlier checkpoint under this name, which may then be replaced
            even if its manifest is missing or damaged.

    Raises:
        NoSpace: the disk has no room; nothing is left behind and earlier checkpoints are untouched.
        NotMadeHere: the name is taken by a directory that this run did not make.
        VerificationFailed: the first checkpoint of these parameters does not load back equal.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    size = estimate_size(contents.state, contents.facts)
    require_space(target.parent, size)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    remove_tree(temporary)
    temporary.mkdir()
    try:
        with beside_training(next(contents.model.parameters()).device):  # frozen weights may be written too
            _write_files(temporary, contents)
            if contents.parent is None or contents.parent.parameters != contents.state.describe_parameters():
                prove_roundtrip(contents.model, temporary, contents.state.weights)
        manifest = _describe(temporary, contents)
        write_file(temporary / MANIFEST, canonical_json(manifest.model_dump(mode="json")) + b"\n")
        remove_checkpoint(target, run=contents.facts.run, recorded=recorded)  # damaged, or the step was trained again
        publish_directory(temporary, target)
    except (OSError, NotMadeHere, Unreadable, VerificationFailed) as error:
        discard_tree(temporary)
        if is_out_of_space(error):
            raise _no_space(target.parent, size) from None
        raise
    return manifest


def estimate_size(state: Snapshot, facts: Facts) -> int:
    """Return the bytes that the next checkpoint needs: weights, optimizer, static files, and a little for the rest."""
    return state.size + sum(len(data) for data in facts.static_files.values()) + SMALL_FILES


def require_space(folder: Path, size: int) -> None:
    """Refuse to begin a checkpoint that does not fit.

    Raises:
        NoSpace: fewer than `size` bytes plus a margin are free.
    """
    if shutil.disk_usage(folder).free < size * SPACE_MARGIN:
        raise _no_space(folder, size)


def _no_space(folder: Path, size: int) -> NoSpace:
    free = shutil.disk_usage(folder).free
    is_full = free < size * SPACE_MARGIN
    here = f"{free / 1e6:.1f} MB are free" if is_full else f"less can be written: {why_less(folder)}"
    return NoSpace(
        f"the next checkpoint needs {size / 1e6:.1f} MB and {here}",
        where=folder,
        hint="Free some space (lower keep_boundaries, or move the run), then: onward train. The last commit is intact.",
    )


def _write_files(folder: Path, contents: Contents) -> None:
    """Write all files except the manifest."""
    state, config = contents.state, contents.config
    save_weights(contents.model, state.weights, folder)
    huggingface.save(huggingface.optimizer_state(state, config), folder / huggingface.OPTIMIZER)
    if state.scale is not None:
        huggingface.save(state.scale.to_file(), folder / huggingface.SCALER)
    huggingface.save(huggingface.scheduler_state(state, config), folder / huggingface.SCHEDULER)
    huggingface.save(huggingface.random_state(config, state.step), folder / huggingface.RNG)
    (folder / huggingface.TRAINER_STATE).write_bytes(huggingface.trainer_state(state, config, contents.log_history))
    (folder / huggingface.TRAINING_ARGUMENTS).write_bytes(huggingface.training_arguments(config))
    for name, data in contents.facts.static_files.items():
        (folder / name).write_bytes(data)
    for path in folder.iterdir():
        fsync_file(path)


def _describe(folder: Path, contents: Contents) -> Manifest:
    state, config, facts, parent = contents.state, contents.config, contents.facts, contents.parent
    files = {
        path.name: {"size": path.stat().st_size, "xxh3": xxh3_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    measured = contents.measurement.to_dict()
    gradient = measured.pop(GRADIENT)  # separate: readers of earlier releases accept only what they measured
    return Manifest(
        format=FORMAT,
        run=facts.run,
        step=state.step,
        state=state.plain(),
        measurement=measured,
        probe_gradient=gradient,
        config=config.recorded(),
        identity=sha256_json(config.identity()),
        base=facts.base,
        tokenizer=facts.tokenizer,
        environment=dict(facts.environment),
        parameters=state.describe_parameters(),
        files=files,
        parent={"step": parent.step, "digest": parent.digest} if parent else None,
    ).sealed()


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting a directory.

    Args:
        manifest: the manifest, if it is valid.
        problems: what was read but differs, or is missing.
    """

    manifest: Manifest | None
    problems: list[str]

    @property
    def verified(self) -> Manifest | None:
        """The manifest, if everything in it is correct."""
        return None if self.problems else self.manifest


def inspect_checkpoint(
    folder: Path, left_out: Collection[str] = (), stop: Callable[[], None] = lambda: None
) -> Inspection:
    """Check a checkpoint's manifest and the hash of every file. Nothing is changed.

    Only what was read but differs, or is certainly missing, is a problem.

    Args:
        left_out: names of files that are not checked.
        stop: called while files are read; may raise.

    Raises:
        Unreadable: something cannot be read now, or another release made the checkpoint, so nothing is known about it.
    """
    values = read_manifest(folder)
    if values is None:
        return Inspection(None, [f"{MANIFEST} is missing"])
    digest = values.pop("digest", "")
    if _digest_of(values) != digest:
        return Inspection(None, [f"{MANIFEST} was changed"])
    if values.get("format") != FORMAT:
        raise _other_release(f"it has format {values.get('format')}, this release knows {FORMAT}", folder)
    try:
        manifest = Manifest.model_validate({**values, "digest": digest})
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise _other_release(f"it was written by another release, whose manifest has another {place}", folder) from None
    looked_at = ((name, entry) for name, entry in manifest.files.items() if name not in left_out)
    found = (_check_file(folder / name, entry, stop) for name, entry in looked_at)
    return Inspection(manifest, [problem for problem in found if problem])


def _digest_of(values: dict[str, Any]) -> str | None:
    try:
        return sha256_json(values)
    except ValueError:  # not a number, or an incomplete character: not written by Onward
        return None


def _other_release(what: str, folder: Path) -> Unreadable:
    return Unreadable(what, where=folder / MANIFEST, hint=NEWER_RELEASE)


def _check_file(path: Path, entry: Mapping[str, Any], stop: Callable[[], None]) -> str | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{path.name} is not a regular file"
        if status.st_size != entry["size"]:
            return f"{path.name} has {status.st_size} bytes instead of {entry['size']}"
        return None if xxh3_file(path, stop) == entry["xxh3"] else f"{path.name} was changed (its hash differs)"
    except OSError as error:
        if error.errno in NO_SUCH_FILE:
            return f"{path.name} is missing"
        raise Unreadable.of(error, path) from None


def remove_checkpoint(folder: Path, *, run: str, recorded: bool = False) -> None:
    """Atomically remove a checkpoint or restore point of a run; do nothing if there is none.

    Args:
        run: identifier of the run that it must belong to.
        recorded: whether the ledger has a record of it, which suffices if its manifest is missing or damaged.

    Raises:
        NotMadeHere: nothing shows that this run made the directory; it is left alone.
        Unreadable: its manifest cannot be read now.
    """
    try:
        folder.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise Unreadable.of(error, folder) from None
    values = read_manifest(folder) or {}
    if values.get("run") != run and not recorded:
        raise NotMadeHere(
            "this directory was not made by this run of Onward, so it is neither replaced nor removed",
            where=folder,
            hint="Move it out of the run's directory, then: onward train",
        )
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}removed-{folder.name}")
    remove_tree(doomed)
    try:
        folder.rename(doomed)  # so that a kill leaves a temporary, not a directory without a manifest
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _empty(folder)  # it comes from a layer below, as of a container's image: no such directory can be renamed
        doomed = folder
    remove_tree(doomed)


def _empty(folder: Path) -> None:
    """Remove all but the manifest, which says whose directory it is."""
    for entry in folder.iterdir():
        if entry.name != MANIFEST:
            remove_tree(entry)
