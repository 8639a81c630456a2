"""The base model on disk: finding it by name or path, and the digest that notices when it changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from onward.config import Config
from onward.digest import sha256_json, xxh3_file
from onward.errors import ModelError
from onward.text import quoted
from onward.training.embedded import EMBEDDED, cache_directory, ensure_embedded, find_embedded

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.index.json", "config.json")
"""Files of a base model that decide what it computes."""


TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
COMPLETE = "A model folder has config.json, *.safetensors and a tokenizer, as save_pretrained writes them."


def resolve_base(name: str, *, download: bool = False, report: Callable[[str], None] = print) -> Path:
    """Return the folder of a base model: an embedded one, a path, or a Hugging Face name.

    Args:
        name: value of the config's `model`.
        download: whether the network may be asked for a name that is not in the local cache.
        report: receives a line when something takes long.

    Raises:
        ModelError: there is no such model here.
    """
    found = find_here(name)
    if found is not None:
        return found
    if name in EMBEDDED:
        return ensure_embedded(name, cache_directory(), report=report)
    path = Path(name).expanduser()
    if path.is_dir():
        raise ModelError("this folder holds no Hugging Face model: config.json is missing", where=path, hint=COMPLETE)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"there is no model {name!r}",
            where="model",
            hint=f"Name a folder with config.json, a Hugging Face name such as org/name, or {', '.join(EMBEDDED)}.",
        )
    return _from_hub(name, download=download, report=report)


def find_here(name: str) -> Path | None:
    """Return the folder of a base model where a look at the disk tells it; None leaves it to `resolve_base`."""
    if name in EMBEDDED:
        return find_embedded(name, cache_directory())
    path = Path(name).expanduser()
    return path.resolve() if (path / "config.json").is_file() else None


def _from_hub(name: str, *, download: bool, report: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        if not download:
            hint = f"onward init makes the one download: onward init NEW_RUN --model {quoted(name)}"
            raise ModelError(f"the model {name!r} is not in the local cache", where="model", hint=hint) from None
    report(f"downloading {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the model {name!r} cannot be had: {reason}",
            where="model",
            hint="Check the name and the network, or give a folder: --model PATH",
        ) from None


def with_absolute_path(config: Config, base: Path) -> Config:
    """Return the config with a model path that means the same folder from any directory."""
    if config.model in EMBEDDED or not Path(config.model).expanduser().is_dir():
        return config
    return config.model_copy(update={"model": str(base)})


def require_complete(folder: Path) -> None:
    """Refuse a folder that lacks what training needs, before a run is made of it.

    Raises:
        ModelError: weights or tokenizer are missing, or config.json is no JSON object.
    """
    try:
        readable = isinstance(json.loads((folder / "config.json").read_bytes()), dict)
    except (OSError, ValueError):
        readable = False
    if not readable:
        raise ModelError("the model's config.json cannot be read", where=folder, hint=COMPLETE)
    if not any(list(folder.glob(pattern)) for pattern in WEIGHTS[:2]):
        raise ModelError("this folder holds no weights", where=folder, hint=COMPLETE)
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ModelError("this folder holds no tokenizer", where=folder, hint=COMPLETE)


def digest_base(folder: Path) -> str:
    """Return the digest of a base model: every weight file and the architecture."""
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    if not any(file.suffix in {".safetensors", ".bin"} for file in files):
        raise ModelError("this folder holds no weights (*.safetensors)", where=folder, hint=COMPLETE)
    return sha256_json({file.name: xxh3_file(file) for file in files})


class BaseDigest:
    """The digest of a base model, taken in a thread: hashing leaves Python's lock to the imports beside it.

    A process that ends does not wait for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._future: Future[str] = Future()
        threading.Thread(target=self._run, name="onward-base", daemon=True).start()

    def _run(self) -> None:
        try:
            self._future.set_result(digest_base(self.folder))
        except Exception as error:  # raised where the digest is wanted
            self._future.set_exception(error)

    def result(self) -> str:
        """Wait for the digest.

        Raises:
            ModelError, OSError: as `digest_base`.
        """
        return self._future.result()
