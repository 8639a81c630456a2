"""How llama.cpp's programs are called, by programs in their place that write down what they were told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import stock
import torch
from safetensors.torch import load_file

from onward.errors import OnwardError, UsageError
from onward.training.model.adapter import ADAPTER_WEIGHTS
from onward.views.export import gguf

CONVERTER = """
import json, os, pathlib, sys
words = sys.argv[1:]
asked = {"words": words, "offline": os.environ.get("HF_HUB_OFFLINE"), "typed": sys.stdin.read()}
pathlib.Path(words[words.index("--outfile") + 1]).write_text(json.dumps(asked))
"""
QUANTIZER = """
import pathlib, sys
wide, target, kind = sys.argv[1:]
pathlib.Path(target).write_text(pathlib.Path(wide).read_text() + kind)
"""
FAILS = """
import sys
print("a result")
print("Traceback\\nunknown \\x1b architecture\\n \\n", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def converters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a built checkout of llama.cpp, and no such programs elsewhere."""
    monkeypatch.setenv("PATH", "")
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    for name in (gguf.MODEL, gguf.ADAPTER):
        (folder / name).write_text(CONVERTER)
    quantizer = folder / "build" / "bin" / gguf.QUANTIZER
    quantizer.with_suffix(".py").write_text(QUANTIZER)
    quantizer.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "$0.py" "$@"\n')
    quantizer.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("kind", "name"), [("f16", "f16"), ("float16", "f16"), ("float32", "f32"), ("bfloat16", "bf16"), ("q8_0", "q8_0")]
)
def test_a_model_is_converted_to_what_the_converter_writes(converters: Path, kind: str, name: str) -> None:
    """By itself, with no network, and nobody to answer a question."""
    target = converters.parent / "a model.gguf"
    gguf.write_model(converters.parent, target, kind, converters)
    words = [str(converters.parent), "--outfile", str(target), "--outtype", name]
    assert {"words": words, "offline": "1", "typed": ""} == json.loads(target.read_text())


def test_other_kinds_are_made_of_the_widest(converters: Path) -> None:
    """A second program makes them, of a file that is gone afterwards."""
    target = converters.parent / "model.gguf"
    gguf.write_model(converters.parent, target, "q4_k_m", converters)
    assert target.read_text().endswith('"typed": ""}q4_k_m')
    assert 'model.gguf.f32", "--outtype", "f32"' in target.read_text()
    assert [converters, target] == sorted(converters.parent.iterdir())


def test_an_adapter_is_converted_for_its_base(converters: Path) -> None:
    """The converter reads the config of the base, and writes what was trained."""
    target = converters.parent / "adapter.gguf"
    gguf.write_adapter(converters.parent / "adapter", converters.parent / "base", target, converters)
    words = [str(converters.parent / "adapter"), "--base", str(converters.parent / "base")]
    assert [*words, "--outfile", str(target), "--outtype", "f32"] == json.loads(target.read_text())["words"]


@pytest.mark.parametrize("shape", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 1.5, "0.mlp.up_proj": 20}}])
def test_an_adapter_has_its_own_scales_in_llama_cpp(shape: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """llama.cpp divides one alpha by the rank of each layer; that gives what PEFT adds to each weight."""
    layers = ["q_proj", "v_proj", "up_proj", "embed_tokens"]
    adapted = stock.lora_model(
        model, target_modules=layers, init_lora_weights=False, rank_pattern={"q_proj": 2}, **shape
    )
    (tmp_path / "plain").mkdir()
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    folder = gguf.as_plain(tmp_path / "adapter", tmp_path / "plain")
    assert folder.name == ("plain" if shape else "adapter")
    values, tensors = json.loads((folder / "adapter_config.json").read_bytes()), load_file(folder / ADAPTER_WEIGHTS)
    assert (False, {}, 8) == (values["use_rslora"], values["alpha_pattern"], values["lora_alpha"])
    for name, part in adapted.named_modules():
        if hasattr(part, "get_delta_weight"):
            first, second = [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}.")]
            added = 8 / first.shape[0] * (second @ first)
            expected: torch.Tensor = cast(Any, part).get_delta_weight("default")
            assert torch.allclose(added if "embed" not in name else added.T, expected, rtol=1e-5, atol=1e-6)


def test_what_llama_cpp_would_leave_out_of_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    """Its programs skip a trained norm without a word."""
    adapted = stock.lora_model(model, modules_to_save=["norm"])
    adapted.save_pretrained(str(tmp_path))
    with pytest.raises(OnwardError, match=r"nothing of an adapter but LoRA, and this one has .*norm\.weight"):
        gguf.as_plain(tmp_path, tmp_path)


def test_what_a_program_refuses_is_told_in_its_last_words(converters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name of the program that was run, and what helps with it; without colour, whatever FORCE_COLOR says."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    target = converters.parent / "model.gguf"
    (converters / "build" / "bin" / f"{gguf.QUANTIZER}.py").write_text(FAILS)
    with pytest.raises(OnwardError) as refused:
        gguf.write_model(converters.parent, target, "q4_k_m", converters)
    assert "llama.cpp's llama-quantize refuses: unknown \x1b architecture" == refused.value.what
    assert "q8_0" in (refused.value.hint or "")
    for name, convert in (
        (gguf.MODEL, lambda: gguf.write_model(converters.parent, target, "f16", converters)),
        (gguf.ADAPTER, lambda: gguf.write_adapter(converters.parent, converters.parent, target, converters)),
    ):
        (converters / name).write_text(FAILS)
        with pytest.raises(OnwardError) as refused:
            convert()
        assert f"llama.cpp's {name} refuses: unknown \x1b architecture" == refused.value.what
        assert (True, True) == (f"{name} FOLDER" in (refused.value.hint or ""), str(refused.value).isascii())
        (converters / name).write_text("1 / 0")
        with pytest.raises(OnwardError, match="refuses: ZeroDivisionError: division by zero"):
            convert()
        (converters / name).write_text("raise SystemExit(1)")
        with pytest.raises(OnwardError, match="it gave no reason"):
            convert()


def test_a_kind_without_its_program_is_refused_before_the_widest_is_written(converters: Path) -> None:
    """The kind that needs none is named."""
    (converters / "build" / "bin" / gguf.QUANTIZER).unlink()
    with pytest.raises(UsageError, match="this kind needs llama-quantize"):
        gguf.write_model(converters.parent, converters.parent / "model.gguf", "q4_k_m", converters)
    assert [converters] == list(converters.parent.iterdir())
