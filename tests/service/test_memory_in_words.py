"""What `init` and `doctor` say about the memory of a step before there was one."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import small
import tiny
import torch
from daemons import configure
from runs import new_run

from onward import Run
from onward.service.proof import memory
from onward.store.ledger import Ledger
from onward.training.device.memory import Usage
from onward.training.model.quiet import LEVELS
from onward.training.steps.memory import largest_part

SMALL, LARGE = Usage(total=1 << 10, free=1 << 10, own=0), Usage(total=1 << 50, free=1 << 50, own=0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model of eight layers, whose memory was measured."""
    folder = tmp_path_factory.mktemp("measured")
    run = new_run(folder / "run", tiny.save_tiny_model(folder / "model", layers=8), batch_size=2, max_length=4096)
    with Ledger(run.layout.ledger) as ledger:
        assert memory.measure_memory(run.layout, ledger).recomputed is not None
    return run.layout.root


def test_a_model_without_an_outline_is_measured_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Experts cannot be outlined; the model is loaded instead, and nothing is said of the attempt."""
    small.small_model("olmoe").save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    run = new_run(tmp_path / "run", tmp_path / "model", method="full", max_length=64)
    loggers = [logging.getLogger(name) for name in LEVELS]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    with Ledger(run.layout.ledger) as ledger:
        assert memory.measure_memory(run.layout, ledger).trained > 0
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    assert [] == caplog.records


@pytest.mark.parametrize(
    ("setting", "usage", "again"),
    [
        ("off", LARGE, False), ("off", SMALL, False), ("on", LARGE, True), ("on", SMALL, True),
        ("auto", LARGE, False), ("auto", SMALL, True), ("auto", None, False),
    ],
)  # fmt: skip
def test_layers_are_computed_again_if_a_step_does_not_fit_otherwise(
    setting: str, usage: Usage | None, again: bool, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or if the config says so; the figures are those of what will be done."""
    run = Run(shutil.copytree(measured, tmp_path / "run"))
    configure(run, activation_checkpointing=setting)
    monkeypatch.setattr(memory, "read_usage", lambda _: usage)
    profile = memory.kept_profile(run.layout, run.config)
    assert profile is not None
    estimate = profile.estimate(largest_part(run.config), recompute=again, alone=True)
    how = "layers are computed again" if again else "nothing is computed again"
    found = memory.memory_in_words(run.layout)
    assert found is not None
    assert found[0].startswith(f"{estimate}: parts of 2 rows of 4,096 tokens, {how}")
    assert (usage is not SMALL) == found[1]


def test_the_anchor_s_texts_count(measured: Path, tmp_path: Path) -> None:
    """A step computes them too, at once if a part has so many tokens."""
    run = Run(shutil.copytree(measured, tmp_path / "run"))
    plain = memory.memory_in_words(run.layout)
    configure(run, anchor={"weight": 0.1, "tokens": 8192})
    found = memory.memory_in_words(run.layout)
    assert plain is not None
    assert found is not None
    assert ": parts of 2 rows of 4,096 tokens or of 1 anchor text of 8,192 tokens, " in found[0]
    assert float(plain[0].split()[0]) < float(found[0].split()[0])


@pytest.mark.parametrize("main", [LARGE, SMALL, None])
def test_a_gpu_s_commits_are_copied_to_main_memory(
    main: Usage | None, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may have less room than they take, as in a job of Slurm: then `doctor` warns, whatever the GPU has."""
    run = Run(measured)
    profile = memory.kept_profile(run.layout, run.config)
    assert profile is not None
    monkeypatch.setattr(memory, "kept_profile", lambda *_: replace(profile, device="cuda"))
    monkeypatch.setattr(memory, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(memory, "read_usage", lambda device: main if device.type == "cpu" else LARGE)
    found = memory.memory_in_words(run.layout)
    assert found is not None
    assert (True, main is not SMALL) == ("commits are copied to main memory" in found[0], found[1])
