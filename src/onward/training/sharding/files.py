"""A state written by all ranks at once: each writes and hashes its own shards, and rank 0 writes the manifest last.

The files are those of torch.distributed.checkpoint in safetensors, so they contain only numbers. A folder without its
manifest is not a state.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ByRows

from onward.atomic import TEMPORARY_PREFIX, discard_tree, publish_directory, remove_tree, write_file
from onward.digest import canonical_json, sha256_json, xxh3_file
from onward.errors import DamagedState, Unreadable, VerificationFailed
from onward.training.ranks.forming import FOREVER
from onward.training.sharding.shards import Shards
from onward.training.state import Snapshot

MANIFEST = "shards.json"
FORMAT = 1
WEIGHT = "weight"
FILE_BYTES = 1 << 29
"""Bytes of whole tensors whose shards share a file, unless one alone is larger; while a file is written, a copy of it
is in memory."""


class ShardManifest(BaseModel):
    """The content of `shards.json`. `digest` covers every other field.

    Args:
        ranks: how many ranks wrote the shards.
        state: counters and cursor.
        count: the optimizer's step counter, on which all weights agree.
        groups: the optimizer's groups as its `state_dict` has them.
        trained: names of the trained weights in the optimizer's order.
        tensors: shape and type of each whole tensor, by key: `weight/NAME`, or `SLOT/NAME` for a moment.
        files: size and xxh3 of each file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    ranks: int
    state: dict[str, Any]
    count: int
    groups: list[dict[str, Any]]
    trained: list[str]
    tensors: dict[str, tuple[list[int], str]]
    files: dict[str, dict[str, Any]]
    digest: str = ""

    @property
    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as in an `optimizer.pt`: JSON has lists in place of tuples."""
        return [{key: tuple(value) if key == "betas" else value for key, value in each.items()} for each in self.groups]

    def sealed(self) -> ShardManifest:
        """Return the manifest with its digest."""
        return self.model_copy(update={"digest": sha256_json(self.model_dump(mode="json", exclude={"digest"}))})


def host_mesh() -> DeviceMesh:
    """Return all ranks with main memory as their device, in a group of their own; every rank calls this once.

    The group may be used in a thread while the training group is in use.
    """
    group: Any = dist.new_group(backend="gloo", timeout=FOREVER, group_desc="onward-shards")
    return DeviceMesh.from_group(group, "cpu")


def write_shards(
    target: Path, snapshot: Snapshot, shards: Shards, host: DeviceMesh, *, file_bytes: int = FILE_BYTES
) -> None:
    """Write a state into a folder that appears whole or not at all. Every rank calls this, with its own snapshot.

    The ranks write to one disk. If a rank cannot write, all raise its error; if one is lost, the others raise. Then
    nothing appears.

    Args:
        snapshot: this rank's copy of its shards, in main memory.
        host: `host_mesh()`.
        file_bytes: see `FILE_BYTES`.

    Raises:
        OSError: a rank could not write.
        RuntimeError: a rank is gone.
        VerificationFailed: the ranks have states of different steps.
    """
    snapshot.wait()
    is_first = host.get_local_rank() == 0
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        with _on_all(host):
            if is_first:
                remove_tree(temporary)
                temporary.mkdir(parents=True)
        tensors = _tensors(snapshot, shards, host)
        files = _write_files(temporary, snapshot, tensors, host, file_bytes)
        with _on_all(host):
            if is_first:
                manifest = _describe(snapshot, tensors, host.size(), files)
                write_file(temporary / MANIFEST, canonical_json(manifest.model_dump(mode="json")) + b"\n")
                publish_directory(temporary, target)
    except Exception:
        if is_first:
            discard_tree(temporary)
        raise


def _write_files(
    folder: Path, snapshot: Snapshot, tensors: Mapping[str, DTensor], host: DeviceMesh, file_bytes: int
) -> dict[str, dict[str, Any]]:
    """Write and hash this rank's shards; return size and hash of the files of all ranks, by name."""
    writer = HuggingFaceStorageWriter(str(folder), _files_of(tensors, file_bytes), save_distributed=True)
    held = {key: tensor for key, tensor in tensors.items() if tensor.to_local().numel()}
    try:
        save(cast(Any, held), storage_writer=writer, process_group=host.get_group())
    except CheckpointException as error:
        raise _met(error) from None
    own: dict[str, dict[str, Any]] = {}
    with _on_all(host):
        own = {path.name: _hashed(path) for path in sorted(folder.glob(f"shard-{host.get_local_rank() + 1:05}-*"))}
    every: list[Any] = [None] * host.size()
    dist.all_gather_object(every, (own, snapshot.plain(), snapshot.adam_step()), group=host.get_group())
    if any(told[1:] != every[0][1:] for told in every):
        raise VerificationFailed(
            "the ranks have states of different steps",
            where="devices",
            hint="None of it was committed. The last commit is intact: onward train",
        )
    return {name: entry for files, *_ in every for name, entry in files.items()}


def _met(error: CheckpointException) -> Exception:
    """Return the error of a rank, preferring an error of the disk."""
    failures = [failure for failure, _ in error.failures.values()]
    found = next((failure for failure in failures if isinstance(failure, OSError)), failures[0])
    return found if isinstance(found, Exception) else RuntimeError(str(found))


@contextlib.contextmanager
def _on_all(host: DeviceMesh) -> Generator[None]:
    """Raise on every rank a disk error that the body meets on any rank, once all have reached its end."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    found: list[Any] = [None] * host.size()
    told = None if failure is None else (failure.errno, failure.strerror, failure.filename)
    dist.all_gather_object(found, told, group=host.get_group())
    if failure is not None:
        raise failure
    for met in found:
        if met is not None:
            raise OSError(*met)


def read_manifest(folder: Path) -> ShardManifest:
    """Return the manifest of shards; this does not check the files yet.

    Raises:
        DamagedState: it is missing, or is not what was written.
        Unreadable: it cannot be read now.
    """
    path = folder / MANIFEST
    try:
        manifest = ShardManifest.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise DamagedState("the shards have no manifest: writing them did not finish", where=path) from None
    except OSError as error:
        raise Unreadable.of(error, path) from None
    except (ValueError, ValidationError):
        raise DamagedState("this is not a manifest of shards", where=path) from None
    if manifest.format != FORMAT or manifest.sealed().digest != manifest.digest:
        raise DamagedState("the manifest of the shards was changed", where=path)
    return manifest


def require_files(folder: Path, manifest: ShardManifest) -> None:
    """Check every file against the manifest.

    Raises:
        DamagedState: one is missing or was changed.
        Unreadable: one cannot be read now.
    """
    for name in sorted(manifest.files):
        try:
            found = _hashed(folder / name)
        except FileNotFoundError:
            raise DamagedState("a file of the shards is missing", where=folder / name) from None
        except OSError as error:
            raise Unreadable.of(error, folder / name) from None
        if found != manifest.files[name]:
            raise DamagedState("a file of the shards was changed (its hash differs)", where=folder / name)


def _tensors(snapshot: Snapshot, shards: Shards, host: DeviceMesh) -> dict[str, DTensor]:
    """Return every tensor of a state by key, with this rank's rows in it."""
    rows = {f"{WEIGHT}/{name}": shards[name].rows(tensor) for name, tensor in snapshot.weights.items()}
    for slot in snapshot.method.slots:
        rows.update({f"{slot}/{name}": shards[name].rows(entry[slot]) for name, entry in snapshot.moments.items()})
    found = {key: _whole(tensor, shards[key.split("/", 1)[1]].shape, host) for key, tensor in rows.items()}
    frozen = {f"{WEIGHT}/{name}": weight for name, weight in shards.frozen.items()}
    return found | {key: _whole(weight.to_local().detach().cpu(), weight.shape, host) for key, weight in frozen.items()}


def _whole(rows: torch.Tensor, shape: torch.Size, host: DeviceMesh) -> DTensor:
    """Return a distributed tensor of which this rank has these rows."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, host, [ByRows(0)], run_check=False, shape=shape, stride=stride)


def _files_of(tensors: Mapping[str, DTensor], file_bytes: int) -> dict[str, int]:
    """Return the number of the file, from 1, that each tensor's shards are written to."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > file_bytes:
            number, filled = number + 1, 0
        numbers[key], filled = number, filled + size
    return numbers


def _hashed(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "xxh3": xxh3_file(path)}


def _describe(
    snapshot: Snapshot, tensors: Mapping[str, DTensor], ranks: int, files: dict[str, dict[str, Any]]
) -> ShardManifest:
    kinds = {key: (list(each.shape), str(each.dtype).removeprefix("torch.")) for key, each in tensors.items()}
    return ShardManifest(
        ranks=ranks,
        state=snapshot.plain(),
        count=snapshot.adam_step(),
        groups=json.loads(json.dumps(snapshot.optimizer["param_groups"])),
        trained=list(snapshot.weights),
        tensors=kinds,
        files=files,
    ).sealed()
