"""The base model on disk: finding it by name or path, and the digest that shows when it changes."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from onward.atomic import replace_file
from onward.config import Config
from onward.digest import sha256_json, xxh3_file
from onward.errors import ModelError, said_by_hub
from onward.layout import RunLayout, typed_path
from onward.text import quoted
from onward.training.model.embedded import EMBEDDED, cache_directory, ensure_embedded, find_embedded

INDEXES = "*.index.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", INDEXES, "config.json")
"""Files of a base model that decide what it computes."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder a PEFT adapter."""
TOKENIZER_MARK = "tokenizer_config.json"
"""The file that every tokenizer of transformers has."""
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", TOKENIZER_MARK)
"""Files one of which at least a tokenizer has."""
TOKENIZER_FILES = (*TOKENIZER, "special_tokens_map.json", "chat_template.jinja", "merges.txt", "added_tokens.json")
"""Files that a tokenizer may have."""
OWN_BASE = "base"
"""Folder of a base model that a run keeps in its own directory."""
OWN_ADAPTER = "adapter"
"""Folder of the adapter that a run starts from, in the run's own directory."""
FSDP_WEIGHTS = "pytorch_model_fsdp.bin"
SHARDS = ("pytorch_model_fsdp_*", "global_step*", "*.distcp", "*_model_states.pt")
"""Names under which FSDP and DeepSpeed save weights, which no library of Hugging Face loads."""
COMPLETE = "A model folder has config.json, *.safetensors and a tokenizer, as save_pretrained writes them."


def resolve_base(
    name: str,
    *,
    root: Path | None = None,
    revision: str | None = None,
    download: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Return the folder of a base model: an embedded one, a path, or a Hugging Face name.

    Args:
        name: value of the config's `model`.
        root: the run's directory, in which a relative path is looked up first.
        revision: which revision a Hugging Face name means; None for the newest that is known here.
        download: whether a name that is not in the local cache may be downloaded.
        report: receives a line when something takes long.

    Raises:
        ModelError: there is no such model here.
    """
    found = find_here(name, root=root)
    if found is not None:
        return found
    if name in EMBEDDED:
        return ensure_embedded(name, cache_directory(), report=report)
    path = typed_path(name)
    if (path / ADAPTER_CONFIG).is_file():
        raise _is_adapter(path)
    if path.is_dir():
        what = "this folder is not a Hugging Face model: config.json is missing"
        raise ModelError(what, where=path, hint=_to_complete(path))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"there is no model {name!r}",
            where="model",
            hint=f"Name a folder with config.json, a Hugging Face name such as org/name, or {', '.join(EMBEDDED)}.",
        )
    return _from_hub(name, revision, download=download, report=report)


def base_of_run(root: Path, name: str, report: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of a run's base model.

    Earlier releases stored the absolute path of a base inside the run's own directory. If there is nothing left at that
    path, the run was moved, and its own `base/` is meant; the digest shows whether it is the same. A Hugging Face name
    means the revision that the run is known to be of, as long as the cache has it.

    Args:
        root: the run's directory.
        name: value of the config's `model`.

    Raises:
        ModelError: there is no such model here.
    """
    own, stored = root / OWN_BASE, Path(name)
    was_moved = stored.is_absolute() and stored.name == OWN_BASE and not stored.exists()
    if was_moved and (own / "config.json").is_file():
        return own.resolve()
    return _known_revision(root, name) or resolve_base(name, root=root, report=report)


def keep_revision(root: Path, name: str, folder: Path) -> None:
    """Remember in which folder of the hub's cache a run's base model is.

    The cache moves a name on to the next revision whenever any program asks for it, be it for one file of it.

    Args:
        root: the run's directory.
        name: value of the config's `model`; if it is not a Hugging Face name, nothing is kept.
        folder: what the name was resolved to.
    """
    if name in EMBEDDED or find_here(name, root=root) is not None or _known_revision(root, name) == folder:
        return
    path = RunLayout(root).base_revision
    with contextlib.suppress(OSError):  # the disk is full, or this user may only read the run: it is kept another time
        path.parent.mkdir(exist_ok=True)
        replace_file(path, json.dumps({"model": name, "folder": str(folder)}).encode())


def revision_of(folder: Path) -> str | None:
    """Return the hub's revision that a folder of its cache holds; None for any other folder."""
    is_cached = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if is_cached else None


def _known_revision(root: Path, name: str) -> Path | None:
    """Return the folder that was kept for a Hugging Face name; None if there is none, or no longer a model in it."""
    try:
        kept = json.loads(RunLayout(root).base_revision.read_bytes())
        folder = Path(kept["folder"]) if kept["model"] == name else None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return folder if folder is not None and find_here(name, root=root) is None and _has_weights(folder) else None


def is_own_base(root: Path, folder: Path) -> bool:
    """Return whether a base is the one that a run made and keeps, so that nobody else has it."""
    return folder.resolve() == (root / OWN_BASE).resolve()


def find_here(name: str, *, root: Path | None = None) -> Path | None:
    """Return the folder of a base model if there is one on this disk; None leaves the name to `resolve_base`.

    Args:
        root: the run's directory, in which a relative path is looked up first.
    """
    if name in EMBEDDED:
        return find_embedded(name, cache_directory())
    path = typed_path(name)
    places = [path] if root is None else [root / path, path]
    return next((place.resolve() for place in places if (place / "config.json").is_file()), None)


def _from_hub(name: str, revision: str | None, *, download: bool, report: Callable[[str], None]) -> Path:
    """Return the folder of a model in the hub's cache, which may hold a part of it: programs fetch single files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        found = None
    usable = found if found is not None and _has_weights(found) else None
    if usable is not None and (not download or any((usable / file).is_file() for file in TOKENIZER)):
        return usable
    if not download:
        part = "is not in the local cache" if found is None else "is in the local cache only in part, without weights"
        hint = f"Only init and adopt download: onward init NEW_RUN --model {quoted(name)}"
        raise ModelError(f"the model {name!r} {part}", where="model", hint=hint)
    report(f"downloading {name}")
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # from the network, its libraries, or the hub
        if usable is not None:
            return usable
        raise _not_downloaded(name, error) from None
    if not _has_weights(found):
        copy = f"hf download {quoted(name)} --local-dir FOLDER; then: --model FOLDER"
        raise ModelError(
            f"the model {name!r} has no *.safetensors here", where=found,
            hint=f"Unset HF_HUB_OFFLINE, if it is set. If the hub has its weights only as pytorch_model.bin: {copy}",
        )  # fmt: skip
    return found


def _not_downloaded(name: str, error: Exception) -> ModelError:
    """Return what to raise for a download that failed."""
    words, status = said_by_hub(error)
    hint = "Check the name and the network, or give a folder: --model PATH"
    if status in (401, 403, 404):  # a hub does not tell strangers what is private
        hint = "Check the name. For a private or gated model: ask for access on its page, then hf auth login"
    return ModelError(f"the model {name!r} cannot be downloaded: {words}", where="model", hint=hint)


def _has_weights(folder: Path) -> bool:
    """Return whether a folder has files of weights, and all of those that its index names."""
    index = folder / "model.safetensors.index.json"
    names = _indexed(index) if index.is_file() else set[str]()
    if names:
        return all((folder / name).is_file() for name in names)
    return any(path.is_file() for pattern in WEIGHTS[:2] for path in folder.glob(pattern))


def with_stored_path(config: Config, base: Path, root: Path) -> Config:
    """Return the config with a model path that means the same folder in any directory.

    A folder inside the run's directory is stored relative to it, so that the run can be moved. Names stay as they are.

    Args:
        base: the folder that the config's `model` was resolved to.
        root: the run's directory.
    """
    if config.model in EMBEDDED or find_here(config.model, root=root) is None:
        return config
    here = root.resolve()
    return config.model_copy(update={"model": str(base.relative_to(here) if base.is_relative_to(here) else base)})


def require_complete(folder: Path) -> None:
    """Refuse a folder that lacks what training needs, before a run is made from it.

    Raises:
        ModelError: weights or tokenizer are missing, or config.json is not a JSON object.
    """
    try:
        readable = isinstance(json.loads((folder / "config.json").read_bytes()), dict)
    except (OSError, ValueError):
        readable = False
    if not readable:
        raise ModelError("the model's config.json cannot be read", where=folder, hint=COMPLETE)
    if not {file.name for pattern in WEIGHTS[:2] for file in folder.glob(pattern)} - {FSDP_WEIGHTS}:
        raise ModelError("this folder has no weights", where=folder, hint=_to_complete(folder))
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ModelError("this folder has no tokenizer", where=folder, hint=COMPLETE)


def _to_complete(folder: Path) -> str:
    """Return what to do about a folder that lacks files; of weights in shards, `adopt` says how to join them."""
    if any(next(folder.glob(pattern), None) for pattern in (FSDP_WEIGHTS, *SHARDS)):
        return (
            f"It has what FSDP or DeepSpeed saved. How to go on from that: onward adopt {quoted(folder)} --run NEW_RUN"
        )
    return COMPLETE


def require_plain(folder: Path, *, method: str) -> None:
    """Refuse anything but a model with full weights that transformers' own code can load.

    Args:
        method: the config's `method`.

    Raises:
        ModelError: the folder holds an adapter, quantized weights, or needs code of its own.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise _is_adapter(folder)
    config = json.loads((folder / "config.json").read_bytes())
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        settings = cast(dict[str, Any], quantization)
        kind = str(settings.get("quant_method", "unknown"))
        if kind == "bitsandbytes":
            if method == "qlora" and settings.get("load_in_4bit"):
                return
            kind = f"{kind}, {4 if settings.get('load_in_4bit') else 8} bits"
        raise ModelError(
            f"its weights are quantized ({kind})",
            where=folder,
            hint="Name the unquantized model from which it was made; to train on it in 4 bits add: --set method=qlora",
        )
    if config.get("auto_map") and not _is_known(str(config.get("model_type"))):
        raise ModelError(
            "it needs its own code (auto_map in config.json), which Onward never runs",
            where=folder,
            hint="Look for a version converted to an architecture of transformers; its name often ends in -hf.",
        )


def _is_known(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _is_adapter(folder: Path) -> ModelError:
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    named = quoted(base) if isinstance(base, str) and base else "BASE"
    return ModelError(
        "this folder contains an adapter, not a model",
        where=folder,
        hint=f"Start from its weights: onward init NEW_RUN --model {named} --adapter {quoted(folder)}",
    )


def digest_base(folder: Path) -> str:
    """Return the digest of a base model: all weight files and the architecture."""
    files = {file.name: file for pattern in WEIGHTS for file in folder.glob(pattern)}
    elsewhere = [name for index in folder.glob(INDEXES) for name in _indexed(index) if "/" in name]
    files |= {name: folder / name for name in elsewhere if (folder / name).is_file()}
    if not any(name.endswith((".safetensors", ".bin")) for name in files):
        raise ModelError("this folder has no weights (*.safetensors)", where=folder, hint=COMPLETE)
    return sha256_json({name: xxh3_file(file) for name, file in files.items()})


def _indexed(index: Path) -> set[str]:
    """Return the names of weight files in an index, which may be in other folders; none if it cannot be read."""
    try:
        return set(map(str, json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


class BaseDigest:
    """The digest of a base model, computed in a thread: hashing releases the GIL, so imports can go on.

    A process that ends does not wait for the thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._future: Future[str] = Future()
        threading.Thread(target=self._run, name="onward-base", daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(digest_base(self.folder))
        except Exception as error:  # raised by `result`
            self._future.set_exception(error)

    def result(self) -> str:
        """Wait for the digest.

        Raises:
            ModelError, OSError: as for `digest_base`.
        """
        return self._future.result()
