"""Writes a committed state as files for others: checked, whole or not at all, never over something that exists."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from onward.atomic import (
    TEMPORARY_PREFIX,
    discard_tree,
    fsync_directory,
    fsync_file,
    publish_directory,
    remove_tree,
    system_errors,
)
from onward.config.text import read_config
from onward.errors import NoSpace, OnwardError, Unreadable, UsageError, cannot_write, is_out_of_space
from onward.layout import RunLayout, entries
from onward.text import quoted
from onward.training.model.adapter import ADAPTER_WEIGHTS
from onward.training.model.base import (
    ADAPTER_CONFIG,
    TOKENIZER,
    TOKENIZER_FILES,
    base_of_run,
    digest_base,
    is_own_base,
    revision_of,
)
from onward.views.chat.prompts import Prompts
from onward.views.export import gguf
from onward.views.export.card import BaseFacts, base_facts, copy_card, verify_now, write_card
from onward.views.export.merged import write_merged
from onward.views.export.ollama import modelfile
from onward.views.loaded import base_of_point, has_adapter, tokenizer_of
from onward.views.locked import make_locked
from onward.views.points import Point, hold

FORMATS = ("adapter", "merged", "gguf", "ollama")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODEL_GGUF, ADAPTER_GGUF, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
SPARE = 64 << 20
"""Bytes in addition to the weights that must be free before anything is written."""


@dataclass(frozen=True)
class Wanted:
    """What to export.

    Args:
        target: the folder to make; for `gguf`, it may also be a file whose name ends in `.gguf`.
        format: one of `FORMATS`; None for the adapter, or the model of a run that trains all weights.
        at: the state, as `--at` names it.
        dtype: type of the weights; None for those of the base (merged), or as trained (adapter).
        quantize: for `gguf` and `ollama`: q8_0, q4_k_m or f16; None for f16.
    """

    target: Path
    format: str | None = None
    at: str | None = None
    dtype: str | None = None
    quantize: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether a single file is written, not a folder."""
        return self.format == "gguf" and self.target.suffix == ".gguf"

    @property
    def kind(self) -> str:
        """How the weights of a GGUF file are stored."""
        return self.quantize or self.dtype or "f16"

    def require_possible(self) -> None:
        """Refuse options that make no sense, before anything is loaded.

        Raises:
            UsageError: a value is unknown, two do not go together, or the target exists.
        """
        kinds = (*gguf.DIRECT, *gguf.K_QUANTS)
        for word, known, option in ((self.format, FORMATS, "--format"), (self.dtype, DTYPES, "--dtype")):
            if word is not None and word not in known:
                raise UsageError(f"there is no {word!r}", where=option, hint=f"There are: {', '.join(known)}.")
        if self.quantize is not None and self.quantize not in kinds:
            raise UsageError(f"there is no {self.quantize!r}", where="--quantize", hint="q8_0, q4_k_m or f16.")
        if self.quantize is not None and (self.format not in ("gguf", "ollama") or self.dtype is not None):
            what = "--quantize is for the formats gguf and ollama, in place of --dtype"
            hint = "Leave out --dtype." if self.dtype is not None else "Add --format gguf, or --format ollama."
            raise UsageError(what, where="--quantize", hint=hint)
        if self.target.suffix.lower() == ".gguf" and not self.is_file:
            what = f"this would make a folder with the name of a GGUF file: --format is {self.format or 'not given'}"
            file = quoted(self.target.with_suffix(".gguf"))
            hint = f"Write a file: onward export {file} --format gguf; or name the folder otherwise."
            raise UsageError(what, where=self.target, hint=hint)
        if self.target.exists() or self.target.is_symlink():
            what = "something of this name already exists, and nothing is written over it"
            raise UsageError(what, where=self.target, hint="Name another, or remove it.")


def export(layout: RunLayout, wanted: Wanted, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Export a state; the target is complete when this returns, and does not exist if it raises.

    Args:
        report: receives a line for each thing done.

    Returns:
        What was written: `target`, `format`, `step`, `at`, `base` (name, digest, licence), `files` with their bytes,
        and for a merged model `difference`, the largest difference of its logits from those of base and adapter.

    Raises:
        UsageError: it cannot be exported like that.
        NoSpace: the disk has no room.
        VerificationFailed: the merged model computes something else.
    """
    wanted.require_possible()
    if wanted.format is None:
        is_whole = read_config(layout.config).method == "full"
        wanted = replace(wanted, format="merged" if is_whole else "adapter")
    converters = gguf.require_converters(wanted.kind) if wanted.format in ("gguf", "ollama") else None
    with hold(layout, wanted.at) as point, _published(wanted) as folder:
        writing = _Writing(layout, point, wanted, folder, report)
        writing.require_space()
        result = writing.write(converters)
    return {"target": str(wanted.target), "format": wanted.format, "step": point.step, "at": point.label, **result}


class _Writing:
    """One export while it is written."""

    def __init__(
        self, layout: RunLayout, point: Point, wanted: Wanted, folder: Path, report: Callable[[str], None]
    ) -> None:
        self._layout, self._point, self._wanted, self._folder, self._report = layout, point, wanted, folder, report
        config = read_config(layout.config)
        self._is_adapter = has_adapter(point)
        if self._is_adapter:
            base = base_of_point(layout, config, point)
            self._base, digest = base.folder, base.digest
        else:
            self._base = base_of_run(layout.root, config.model)
            digest = digest_base(self._base) if point.manifest is None else point.manifest.base["digest"]
        self._facts: BaseFacts = base_facts(layout, self._base, digest)
        self._tokenizer = tokenizer_of(layout, config, point)

    def require_space(self) -> None:
        """Refuse an export that does not fit on the disk, before anything is written.

        Raises:
            NoSpace: it does not.
        """
        weights = self._point.folder if not self._is_adapter else self._base
        size = sum(path.stat().st_size for path in weights.glob("*.safetensors"))
        factor = {"adapter": 0, "merged": 1}.get(str(self._wanted.format), 4)
        own = sum(path.stat().st_size for path in entries(self._point.folder) if path.is_file())
        needed, free = size * factor + own + SPARE, shutil.disk_usage(self._folder).free
        if free < needed:
            what = f"the export needs up to {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free"
            raise NoSpace(what, where=self._wanted.target.parent, hint="Free some space, or name another place.")

    def write(self, converters: Path | None) -> dict[str, Any]:
        """Write everything; return what to tell the user."""
        facts, result = {"Format": str(self._wanted.format)}, dict[str, Any]()
        if self._wanted.format == "adapter":
            facts |= self._write_adapter(self._folder)
        elif converters is None:
            result = self._write_merged(self._folder, self._dtype())
        else:
            result = self._write_gguf(converters)
            facts["Weights"] = self._wanted.kind
        if "difference" in result:
            written = f"; as written in {result['dtype']}, {result['written_difference']:.3g}" if not converters else ""
            said = f"{result['difference']:.3g} from base and adapter, in float32{written}"
            facts["Largest difference of logits"] = said
        if not self._wanted.is_file:
            self._write_card(facts)
        base = {"name": self._facts.name, "digest": self._facts.digest, "licence": self._facts.licence}
        sizes = {path.name: path.stat().st_size for path in entries(self._folder) if path.is_file()}
        return {"base": base, "files": sizes, **result}

    def _write_card(self, facts: dict[str, str]) -> None:
        if self._point.release is None or not copy_card(self._point.folder, self._folder, facts):
            write_card(self._layout, self._point, self._facts, self._folder, facts, verify_now(self._layout))

    def _dtype(self) -> torch.dtype:
        if self._wanted.dtype is not None:
            return DTYPES[self._wanted.dtype]
        stated = json.loads((self._base / "config.json").read_bytes())
        name = str(stated.get("dtype") or stated.get("torch_dtype") or "float32").removeprefix("torch.")
        return DTYPES.get(name, torch.float32)

    def _write_adapter(self, folder: Path) -> dict[str, str]:
        """Copy the adapter, with the public name of its base; return what the card says of it."""
        if not self._is_adapter:
            what = "this run trains all weights, so there is no adapter"
            raise UsageError(what, where="--format", hint="--format merged writes the model.")
        tensors = load_file(self._point.folder / ADAPTER_WEIGHTS)
        if self._wanted.dtype is not None:
            tensors = {name: tensor.to(DTYPES[self._wanted.dtype]) for name, tensor in tensors.items()}
        with system_errors(folder):
            save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        values = json.loads((self._point.folder / ADAPTER_CONFIG).read_bytes())
        values |= {"base_model_name_or_path": self._facts.name, "revision": revision_of(self._base)}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        self._copy_tokenizer(folder)
        self._report(f"the adapter of {self._point.label}; its base is {self._facts.name}")
        if not is_own_base(self._layout.root, self._base):
            return {}
        self._report(
            f"that base is the run's own, and the adapter fits no other: pass {quoted(self._base)} on with it, or "
            "export --format merged"
        )
        return {"Fits": "only the run's own model, in its folder `base/`: on any other it is another model"}

    def _write_merged(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        stop_ids = Prompts(self._tokenizer).stop_ids
        merging = write_merged(self._point.folder, self._base, dtype, folder, stop_ids)
        self._copy_tokenizer(folder)
        name = str(dtype).removeprefix("torch.")
        self._report(
            f"merged {self._point.label}: logits differ from base and adapter by at most {merging.merged:.3g} "
            f"(of {merging.largest:.3g}), as written in {name} by {merging.written:.3g}"
        )
        return {"difference": merging.merged, "written_difference": merging.written, "dtype": name}

    def _write_gguf(self, converters: Path) -> dict[str, Any]:
        """Write the merged model as GGUF and, if the target is a folder and there is one, the adapter alone too."""
        said = {"onward.base.digest": self._facts.digest, "onward.base.name": self._facts.name,
                "onward.state": self._point.label}  # fmt: skip
        merged = self._folder / "merged"
        merged.mkdir()
        result = self._write_merged(merged, torch.float32)
        name = self._wanted.target.name if self._wanted.is_file else MODEL_GGUF
        gguf.write_model(merged, self._folder / name, self._wanted.kind, converters)
        gguf.add_metadata(self._folder / name, said)
        remove_tree(merged)
        if self._is_adapter and self._wanted.format == "gguf" and not self._wanted.is_file:
            self._write_gguf_adapter(converters, said)
        if self._wanted.format == "ollama":
            (self._folder / MODELFILE).write_text(modelfile(self._tokenizer, name), encoding="utf-8")
            self._report(f"next: ollama create NAME -f {quoted(self._wanted.target / MODELFILE)}")
        del result["written_difference"]  # of what was converted, not of what is left
        return {**result, "dtype": self._wanted.kind}

    def _write_gguf_adapter(self, converters: Path, said: dict[str, str]) -> None:
        plain = self._folder / "plain"
        plain.mkdir()
        try:
            adapter = gguf.as_plain(self._point.folder, plain)
            gguf.write_adapter(adapter, self._base, self._folder / ADAPTER_GGUF, converters)
        except OnwardError as error:  # llama.cpp supports fewer kinds of adapters than PEFT
            self._report(f"without {ADAPTER_GGUF}: {error.what}")
            return
        finally:
            remove_tree(plain)
        gguf.add_metadata(self._folder / ADAPTER_GGUF, said)

    def _copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer with the run's chat template from the state or, failing that, from the run."""
        source = self._point.folder
        if not any((source / name).is_file() for name in TOKENIZER):
            source = self._layout.tokenizer(self._base)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _mode(folder: Path) -> int:
    """Return the mode of an ordinary new file, derived from that of a new folder."""
    return folder.stat().st_mode & 0o666


def _about(error: OSError, target: Path, temporary: Path | None) -> OnwardError:
    """Return what to say of something that the system refused: what is outside `temporary` was to be read."""
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else target
    is_source = temporary is not None and place != target and not place.is_relative_to(temporary)
    if is_source and not is_out_of_space(error):  # a copy that fills the disk names the file that it reads
        return Unreadable.of(error, place)
    return cannot_write(error, place)


@contextmanager
def _published(wanted: Wanted) -> Generator[Path]:
    """Give the body a folder next to the target; afterwards make it, or its only file, the target."""
    parent = wanted.target.absolute().parent
    if not parent.is_dir():
        raise UsageError("there is no such folder", where=parent, hint=f"mkdir -p {quoted(parent)}")
    temporary = lock = None
    try:
        temporary, lock = make_locked(parent, f"{TEMPORARY_PREFIX}export-")  # two of one target never share it
        yield temporary
        for path in temporary.iterdir():
            path.chmod(_mode(temporary))  # safetensors makes its files readable only by their owner
            fsync_file(path)
        wanted.require_possible()  # it may exist by now
        if wanted.is_file:
            (temporary / wanted.target.name).rename(wanted.target)
            fsync_directory(parent)
        else:
            publish_directory(temporary, wanted.target)
    except OSError as error:
        raise _about(error, wanted.target, temporary) from None
    finally:
        if temporary is not None and lock is not None:
            discard_tree(temporary)
            os.close(lock)
