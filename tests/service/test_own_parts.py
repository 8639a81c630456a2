"""What a run is given of its own when it is made: more tokens, what is left of a base, an adapter to start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import checkpoints
import pytest
import small
import stock
import tiny
import torch
from commands import onward
from peft import LoraConfig, PeftModel, get_peft_model
from runs import UNMEASURED
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from onward import Run
from onward.config import Config
from onward.errors import ConfigError, DamagedState, ModelError, OnwardError
from onward.service.tokenizer import copy_tokenizer, load_tokenizer_of
from onward.training.checkpoints.checkpoint import write_checkpoint
from onward.training.model.start_adapter import read_start_adapter, with_start_adapter

TOKENS = ["<tool>", "<\u00e9tape>"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose head has weights of its own."""
    tokenizer = tiny.byte_tokenizer()
    folder = tmp_path_factory.mktemp("untied")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(path: Path, seed: int, text: str = "") -> Path:
    """Write a file of four rows, each with a text in its answer."""
    found = tiny.chat_rows(4, seed=seed)
    for row in found:
        row["messages"][-1]["content"] += text
    return tiny.write_jsonl(path / f"{seed}.jsonl", found)


def stock_logits(run: Run) -> torch.Tensor:
    """Return what stock transformers and PEFT compute from the run's newest checkpoint and its base."""
    folder = run.layout.checkpoints()[0]
    if (folder / "config.json").is_file():
        return stock.logits(AutoModelForCausalLM.from_pretrained(folder))
    base = AutoModelForCausalLM.from_pretrained(run.layout.root / run.config.model, dtype=torch.float32)
    return stock.logits(PeftModel.from_pretrained(base, folder))


def embedding(model: Any) -> torch.Tensor:
    """Return the rows of a model's tokens."""
    return model.get_input_embeddings().weight.detach()


def tables(model: Any) -> list[torch.Tensor]:
    """Return the rows of a model's tokens in its embedding and in its head, which may be the same."""
    return [embedding(model), model.get_output_embeddings().weight.detach()]


def train_both_ways(tmp_path: Path, model: Path, files: list[Path], **settings: Any) -> Run:
    """Train the files in one run at once and in another one by one; returns one of two runs of equal bits."""
    names = ("one", "two") if len(files) > 1 else ("one",)
    runs = [Run.create(tmp_path / name, str(model), batch_size=2, **UNMEASURED, **settings) for name in names]
    runs[0].train(*files)
    if len(files) == 1:
        return runs[0]
    for file in files:
        Run(runs[1].layout.root).train(file)
    kept = [checkpoints.files_of(run.layout.checkpoints()[0]) for run in runs]
    names = [name for name in kept[0] if name.endswith((".safetensors", "optimizer.pt", "tokenizer.json"))]
    assert [] == [name for name in names if kept[0][name] != kept[1][name]]
    return runs[1]


@pytest.mark.parametrize(
    ("kind", "tied"), [("rows", True), ("rows", False), ("modules", True), ("one module", False), ("full", False)]
)
def test_new_tokens_are_trained(kind: str, tied: bool, model: Path, untied: Path, tmp_path: Path) -> None:
    """A run with `tokens` keeps a grown base and its tokenizer, trains the new rows, and goes on exactly.

    A new row begins as the mean of the others, in the embedding and in the head, and is trained in both, even if one of
    the two is trained in full.
    """
    saved = {"rows": [], "modules": ["embed_tokens", "lm_head"], "one module": ["embed_tokens"]}
    settings: dict[str, Any] = {"lora": {"rank": 2, "modules_to_save": saved[kind]}} if kind in saved else {}
    if kind == "full":
        settings = {"method": "full"}
    base = model if tied else untied
    files = [rows(tmp_path, seed, "<tool>") for seed in ((1, 2) if kind == "rows" else (1,))]
    run = train_both_ways(tmp_path, base, files, tokens=TOKENS, **settings)
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(run.layout.checkpoints()[0])
    ids = [len(before), len(before) + 1]
    assert ids == after.convert_tokens_to_ids(TOKENS)
    assert [ids[0]] == after("<tool>", add_special_tokens=False)["input_ids"]
    assert {"rows": ids, "one module": {"lm_head": ids}}.get(kind, []) == run.config.lora.trainable_tokens
    state = stock.open_state(run.layout.root)
    torch.testing.assert_close(stock.logits(state.model), stock_logits(run), rtol=0, atol=1e-6)
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, run.layout.root / "base")]
    for old, grown in zip(*map(tables, loaded), strict=True):
        assert torch.equal(old, grown[: len(old)])
        torch.testing.assert_close(old.mean(0).expand(2, -1), grown[ids])
    for grown, trained in zip(tables(loaded[1]), tables(state.model), strict=True):
        assert not torch.equal(grown[ids[0]], trained[ids[0]])
    assert run.verify(deep=kind == "rows" and tied).ok


def test_new_tokens_are_trained_where_others_are_not(untied: Path, tmp_path: Path) -> None:
    """Rows that are named for one of embedding and head leave the other with its new rows; `train` must name both."""
    lora = {"rank": 2, "trainable_tokens": {"lm_head": [3]}}
    run = Run.create(tmp_path / "run", str(untied), later=True, tokens=TOKENS, lora=lora)
    ids = [len(tiny.byte_tokenizer()) + place for place in range(len(TOKENS))]
    assert {"lm_head": [3, *ids], "model.embed_tokens": ids} == run.config.lora.trainable_tokens
    with pytest.raises(ConfigError, match=r"train leaves out model\.embed_tokens.* new tokens would not be trained"):
        Run.create(tmp_path / "full", str(untied), later=True, tokens=TOKENS, method="full", train=["lm_head", "mlp"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_left_of_the_base_is_kept(init: str, model: Path, tmp_path: Path) -> None:
    """With `pissa` and `olora` base and adapter together are the model that was given; the run owns what is left."""
    files = [rows(tmp_path, seed) for seed in ((1, 2) if init == "pissa" else (1,))]
    run = train_both_ways(tmp_path, model, files, lora={"rank": 4, "init": init})
    paths = (model, run.layout.root / "base")
    given, left = (cast(Any, AutoModelForCausalLM.from_pretrained(path)) for path in paths)
    fresh = PeftModel.from_pretrained(left, run.layout.root / "adapter")
    assert not torch.equal(given.model.layers[0].mlp.up_proj.weight, left.model.layers[0].mlp.up_proj.base_layer.weight)
    torch.testing.assert_close(stock.logits(given), stock.logits(fresh), rtol=0, atol=1e-5)
    state = stock.open_state(run.layout.root)
    torch.testing.assert_close(stock.logits(state.model), stock_logits(run), rtol=0, atol=1e-6)
    assert True is json.loads((run.layout.checkpoints()[0] / "adapter_config.json").read_text())["init_lora_weights"]
    assert run.verify(deep=init == "pissa").ok


@pytest.mark.parametrize(
    ("family", "init", "hint"),
    [
        ("gpt2", "olora", "Leave it out, or try pissa."),
        ("olmoe", "olora", "Leave it out, or try gaussian."),
        ("olmoe", "orthogonal", "Leave it out, or try gaussian."),
        ("mamba", "pissa", "These fit: --set 'lora.targets=[dt_proj, in_proj, x_proj]'"),
    ],
)
def test_first_weights_that_do_not_suit_a_layer_are_refused(family: str, init: str, hint: str, tmp_path: Path) -> None:
    """PEFT's OLoRA gives layers of GPT-2 matrices that PEFT does not load, and PEFT fails on experts in one tensor; a
    model that no adapter fits is told its layers. Nothing is made then."""
    small.small_model(family).save_pretrained(tmp_path / "base")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError) as refused:
        Run.create(tmp_path / "run", str(tmp_path / "base"), max_length=64, lora={"rank": 2, "init": init})
    assert hint == refused.value.hint
    assert ("lora.targets" if family == "mamba" else "lora.init") == refused.value.where
    assert not (tmp_path / "run").exists()


def made_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter with weights that do something."""
    shape: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "up_proj"],
        **settings,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted: Any = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **shape | settings)
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_is_a_start(model: Path, tmp_path: Path) -> None:
    """`init --adapter` takes weights, shape and tokenizer of a folder; the run needs it no more; `reset` goes back."""
    folder = made_adapter(model, tmp_path / "adapter", use_dora=True, bias="none")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": "{{ tools | tojson }}" + tiny.CHATML}
    tokenizer.save_pretrained(folder)
    outcome = onward("init", tmp_path / "run", "--adapter", folder, "--set", "batch_size=2")
    assert 0 == outcome.status, outcome.err
    assert "moments, step and learning rate are new" in outcome.err
    run = Run(tmp_path / "run")
    shape = run.config.lora
    assert (4, 12.0, 0.1, ["q_proj", "up_proj"], True) == (
        shape.rank, shape.alpha, shape.dropout, shape.targets, shape.use_dora
    )  # fmt: skip
    expected = {name: weight.clone() for name, weight in load_file(folder / "adapter_model.safetensors").items()}
    shutil.rmtree(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run.layout.root / "tokenizer").chat_template
    assert run.config.model == str(model)
    file = rows(tmp_path, 1)
    run.train(file)
    first = checkpoints.files_of(run.layout.checkpoints()[0])["adapter_model.safetensors"]
    origin = load_file(run.layout.restore_points()[-1] / "adapter_model.safetensors")
    assert [] == [name for name, weight in expected.items() if not torch.equal(weight, origin[name])]
    assert run.verify(deep=True).ok
    run.reset()
    Run(run.layout.root).train(file, again=True)
    assert first == checkpoints.files_of(run.layout.checkpoints()[0])["adapter_model.safetensors"]


def test_a_tokenizer_is_copied_whatever_its_files_are_called(tmp_path: Path) -> None:
    """A vocabulary whose file only its own kind of tokenizer knows is copied with the rest."""
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
    (tmp_path / "from/tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    copy_tokenizer(tmp_path / "from", tmp_path / "to")
    assert load_tokenizer_of(tmp_path / "from") == load_tokenizer_of(tmp_path / "to")


def test_a_start_may_go_on_with_another_dropout(model: Path, tmp_path: Path) -> None:
    """Dropout is no part of an adapter's shape: what is asked for holds, and the rest is the adapter's."""
    start = read_start_adapter(made_adapter(model, tmp_path / "adapter"))
    config = with_start_adapter(Config.model_validate({"lora": {"dropout": 0.3, "rank": 4}}), start)
    assert (0.3, 4, 12.0, str(model)) == (config.lora.dropout, config.lora.rank, config.lora.alpha, config.model)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"lora": {"rank": 8}}, "lora.rank: 4 there, 8 asked"),
    ({}, {"lora": {"init": "gaussian"}}, "lora.init"),
    ({}, {"method": "full"}, "method full has no adapter"),
    ({}, {"tokens": ["<x>"]}, "a run with new tokens cannot start from an adapter"),
    ({"init_lora_weights": "pissa"}, {}, "begun by pissa, which changes the base"),
    ({"init_lora_weights": "loftq"}, {}, "begun by loftq, which changes the base"),
    ({"peft_type": "IA3"}, {}, "adapters of type IA3"),
    ({"alora_invocation_tokens": [1]}, {}, "cannot take over: alora_invocation_tokens"),
    ({"target_modules": ["v_proj"]}, {}, "do not fit its config"),
    ({"r": 5}, {}, "do not fit its config"),
]


@pytest.mark.parametrize(("saved", "settings", "message"), REFUSED)
def test_an_adapter_that_cannot_go_on_is_refused(
    saved: dict[str, Any], settings: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    """Another shape, a kind that changes its base, names or shapes that do not fit: nothing is made."""
    folder = made_adapter(model, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **saved}))
    with pytest.raises((ConfigError, ModelError), match=message):
        Run.create(tmp_path / "run", adapter=str(folder), **settings)
    assert not (tmp_path / "run").exists()


def test_what_a_run_was_made_with_cannot_be_set_later(model: Path, tmp_path: Path) -> None:
    """Tokens, a start and first weights out of the base are made with the run; a later wish for them is refused."""
    file = rows(tmp_path, 1)
    for number, (old, new) in enumerate(
        (("\ntokens: []", '\ntokens: ["<x>"]'), (r'init: "default"', 'init: "pissa"'), (r'adapter: ""', 'adapter: "x"'))
    ):
        run = Run.create(tmp_path / str(number), str(model), lora={"rank": 2})
        text = run.layout.config.read_text()
        run.layout.config.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match="takes effect only when a run is made"):
            Run(run.layout.root).train(file)
    with pytest.raises(ConfigError, match="already in the vocabulary"):
        Run.create(tmp_path / "known", str(model), tokens=["<|im_start|>"])
    assert not (tmp_path / "known").exists()


@pytest.mark.parametrize(("key", "name"), [("adapter", "adapter_model"), ("model", "model")])
def test_a_checkpoint_of_onwards_that_has_changed_is_no_start(key: str, name: str, model: Path, tmp_path: Path) -> None:
    """A byte of its weights that differs from what its manifest says is damage, in an adapter and in a whole model."""
    folder = tmp_path / "checkpoint-1"
    write_checkpoint(folder, checkpoints.make_contents(model, method="full" if key == "model" else "lora"))
    data = bytearray((folder / f"{name}.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / f"{name}.safetensors").write_bytes(data)
    with pytest.raises(DamagedState, match=rf"since: {name}\.safetensors was changed"):
        Run.create(tmp_path / "run", **{key: str(folder)})
    assert not (tmp_path / "run").exists()


def test_a_changed_start_is_noticed(model: Path, tmp_path: Path) -> None:
    """Another adapter in the place of the one that the run was made from is no start."""
    run = Run.create(tmp_path / "run", adapter=made_adapter(model, tmp_path / "adapter"))
    path = run.layout.root / "adapter" / "adapter_model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(OnwardError, match="changed since the run was made"):
        run.train(rows(tmp_path, 1))
    save_file(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), path, metadata={"format": "pt"})
    (run.layout.root / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(OnwardError, match="started from is gone"):
        run.train()
