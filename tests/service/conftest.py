"""What several tests of the service share, made once: checkpoints of a stock Trainer, a trained run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import stock
import tiny
from adopting import train_stock
from runs import new_run
from stock import STEPS
from transformers import AutoModelForCausalLM

from onward.layout import RunLayout


@pytest.fixture(scope="session")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> stock.Saved:
    """A stock LoRA checkpoint, in the middle of a linear schedule."""
    return stock.save_lora(model, tmp_path_factory.mktemp("stock"))


@pytest.fixture
def checkpoint(saved: stock.Saved, tmp_path: Path) -> Path:
    """A copy of the stock checkpoint, to be changed."""
    return shutil.copytree(saved.folder, tmp_path / saved.folder.name)


@pytest.fixture(scope="session")
def by_method(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, stock.Saved]:
    """One stock checkpoint per method; the Trainer of the full one knew the tokenizer, as TRL's does."""
    root = tmp_path_factory.mktemp("by-method")
    whole = AutoModelForCausalLM.from_pretrained(model)
    return {
        "lora": train_stock(stock.lora_model(model), root / "lora"),
        "full": train_stock(whole, root / "full", processing_class=tiny.byte_tokenizer()),
    }


@pytest.fixture(params=("lora", "full"))
def method(request: pytest.FixtureRequest) -> str:
    """Every kind of trained weights."""
    return request.param


@pytest.fixture
def copied(by_method: dict[str, stock.Saved], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that gives a test its own copy of a stock checkpoint."""
    return lambda method: shutil.copytree(by_method[method].folder, tmp_path / method / f"checkpoint-{STEPS}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A training file of five steps."""
    return tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(19, seed=3))


@pytest.fixture(scope="session")
def two_files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on two files; tests copy it."""
    folder = tmp_path_factory.mktemp("two-files")
    run = new_run(folder / "run", model, batch_size=4, max_length=256, lora={"rank": 2})
    run.train(*[tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (8, 4)])
    return run.layout.root


@pytest.fixture
def layout(two_files: Path, tmp_path: Path) -> RunLayout:
    """A copy of the trained run, without the hard links of its boundaries."""
    return RunLayout(Path(shutil.copytree(two_files, tmp_path / "run")))
