"""Onward's own checkpoint becomes another run, as it was written and on the base that it records."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import stock
import tiny
from adopting import RATE, SETTINGS
from runs import new_run
from states import read_state
from stock import STEPS, Saved
from transformers import AutoTokenizer

from onward import Run
from onward.errors import DamagedState, ModelError
from onward.layout import MANIFEST
from onward.service.state.adopted_config import read_adopted
from onward.training.checkpoints.checkpoint import write_checkpoint
from onward.training.model.adapter import ADAPTER_WEIGHTS


def test_adopting_onwards_own_checkpoint_continues_it_exactly(model: Path, tmp_path: Path, file: Path) -> None:
    """A run made from Onward's own checkpoint trains the next file to the state that the first run reaches.

    All of its config is in the checkpoint: nothing has to be set again, and its tokens and chat template go on.
    """
    template = tmp_path / "own.jinja"
    template.write_text(f"<|a|>{AutoTokenizer.from_pretrained(model).chat_template}")
    first = tiny.write_jsonl(tmp_path / "first.jsonl", tiny.chat_rows(20, seed=4))
    settings: dict[str, Any] = {**SETTINGS, "warmup_steps": 8, "learning_rate": RATE, "eps": 1e-6, "seed": 3}
    settings |= {"tokens": ["<|a|>"], "chat_template": str(template), "lora": {"rank": 4, "dropout": 0.1}}
    old = new_run(tmp_path / "old", model, **settings)
    template.unlink()
    old.train(first)
    new = Run.adopt(tmp_path / "old/current_model/checkpoint-5", tmp_path / "new")
    old.train(file)
    new.train(file)
    expected, actual = read_state(tmp_path / "old"), read_state(tmp_path / "new")
    stock.assert_equal(expected.pop("tensors"), actual.pop("tensors"))
    assert expected == actual
    assert Run(tmp_path / "new").verify().ok


def test_a_base_in_4_bits_stays_so(model: Path, tmp_path: Path) -> None:
    """A run's own checkpoint tells whether its base was, unlike a Trainer's; either way can be set."""
    contents = checkpoints.make_contents(model)
    config = contents.config.model_copy(update={"method": "qlora"})
    write_checkpoint(tmp_path / "checkpoint-1", replace(contents, config=config))
    settings: list[dict[str, Any]] = [{}, {"method": "lora"}, {"method": "qlora"}]
    found = [read_adopted(tmp_path / "checkpoint-1", None, each, fresh=False) for each in settings]
    assert ["qlora", "lora", "qlora"] == [adopted.config.method for adopted in found]


@pytest.mark.parametrize(("name", "fresh"), [(ADAPTER_WEIGHTS, True), ("optimizer.pt", False), (MANIFEST, False)])
def test_onwards_own_checkpoint_is_adopted_as_it_was_written(
    name: str, fresh: bool, model: Path, tmp_path: Path
) -> None:
    """A byte that has changed since is damage, not another state, and so is a manifest that ends too early.

    What is not read may be missing.
    """
    folder = tmp_path / "checkpoint-1"
    write_checkpoint(folder, checkpoints.make_contents(model))
    for other in ("rng_state.pth", "scheduler.pt", "training_args.bin"):
        (folder / other).unlink()
    assert 2 == read_adopted(folder, None, {}, fresh=fresh).config.lora.rank
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DamagedState, match=f"it has changed since: {name} was changed") as caught:
        read_adopted(folder, None, {}, fresh=fresh)
    assert f"rm {folder / MANIFEST}" in str(caught.value.hint)


def test_another_base_than_onward_recorded_is_refused_or_told(
    by_method: dict[str, Saved], model: Path, tmp_path: Path
) -> None:
    """An adapter of Onward's own is adopted on the base that it was trained on; on another one if that is named."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    Run.adopt(by_method["lora"].folder, tmp_path / "old", str(base), settings=SETTINGS)
    checkpoint = tmp_path / f"old/current_model/checkpoint-{STEPS}"
    values = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match="not the one on which this adapter was trained") as caught:
        Run.adopt(checkpoint, tmp_path / "new")
    assert f"onward init NEW_RUN --model {base} --adapter {checkpoint}" in str(caught.value.hint)
    told: list[str] = []
    Run.adopt(checkpoint, tmp_path / "new", str(base), report=told.append)
    assert 1 == sum("not the one on which this adapter was trained" in line for line in told)


def test_a_base_that_init_refuses_is_refused(by_method: dict[str, Saved], model: Path, tmp_path: Path) -> None:
    """An adapter on a base that was saved in 4 bits is adopted only as what it is, as `init` does."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    values = json.loads((base / "config.json").read_bytes())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="its weights are quantized") as caught:
        Run.adopt(by_method["lora"].folder, tmp_path / "run", str(base))
    assert "--set method=qlora" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()
