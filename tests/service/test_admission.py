"""Where findings live: made with the run, kept in its ledger, shown by doctor, asked by everything that trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import pytest
import small
import tiny
import torch
from commands import assert_refused, make_run, onward
from peft import PeftModel
from transformers import AutoModelForCausalLM

from onward import Run
from onward.config import Config
from onward.digest import xxh3_file
from onward.errors import ModelError
from onward.service.admission import spec_of_proof
from onward.store.ledger import Ledger
from onward.training.admission.findings import FACT, Findings
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.checkpoint import Manifest

SMALL: dict[str, Any] = {"evaluation": {"share": 0}, "max_length": 128, "batch_size": 4, "lora": {"rank": 2}}


def words() -> list[str]:
    """Return the settings of `make_run` as arguments."""
    return [word for setting in commands.SMALL for word in ("--set", setting)]


def findings(run: Path) -> Findings | None:
    """Return what a run keeps."""
    with Ledger(run / "ledger.sqlite3", read_only=True) as ledger:
        return Findings.of(ledger.get(FACT))


def save(folder: Path, family: str) -> Path:
    """Save a small model of a family with a tokenizer."""
    small.small_model(family).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("sharding", "device"), [("off", "cuda"), ("full", "cpu")])
def test_a_model_is_proven_as_it_is_trained(tmp_path: Path, sharding: str, device: str) -> None:
    """In the compute type of its config, on the device that trains it, if that holds it whole."""
    config = Config.model_validate({"model": "m", "dtype": "bfloat16", "sharding": sharding})
    spec = spec_of_proof(config, tmp_path, torch.device("cuda"))
    assert (config, tmp_path, torch.device(device), torch.bfloat16) == (spec.config, spec.base, spec.device, spec.dtype)


def test_init_says_what_it_found_and_doctor_shows_it(tmp_path: Path, model: Path) -> None:
    """The findings are a fact of the run; the line of `init` is the first one of doctor."""
    outcome = onward("init", tmp_path / "run", "--model", model)
    found = findings(tmp_path / "run")
    assert found is not None
    assert ("end to end", (), ()) == (found.rows, found.left_out, found.warnings)
    assert found.lines()[0] in outcome.err
    assert () == found.writers_in(found.environment)
    assert found.writers_in({**found.environment, "transformers": "another"}) is None
    shown = onward("doctor", "--run", tmp_path / "run", "--json").json
    assert found.lines() == [entry["message"] for entry in shown if entry["subject"] == "model"]


def test_what_is_refused_at_init_leaves_nothing(tmp_path: Path) -> None:
    """A model that looks ahead is refused as wrong usage, in words, and no directory is made."""
    outcome = onward("init", tmp_path / "run", "--model", save(tmp_path / "model", "bert"), *words())
    assert_refused(outcome, 2, "the model looks ahead", '"is_decoder": true')
    assert not (tmp_path / "run").exists()


def test_later_leaves_the_proof_to_the_first_start(tmp_path: Path, model: Path) -> None:
    """Until then doctor warns; then the run is the same as one that was proven at once."""
    now, later = make_run(tmp_path / "now", model), tmp_path / "later"
    assert 0 == onward("init", later, "--model", model, "--later", *words()).status
    assert findings(later) is None
    assert "it is not proven yet" in onward("doctor", "--run", later).out
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(6))
    digests: list[Any] = []
    for run in (now, later):
        Run(run).train(rows)
        found = findings(run)
        assert found is not None
        digests.append(
            (found.rows, json.loads((run / "current_model/checkpoint-2/onward.json").read_text())["measurement"])
        )
    assert digests[0] == digests[1]


def test_a_first_start_refuses_what_init_would_have(tmp_path: Path) -> None:
    """A run that was made with --later of a model that cannot be trained right trains nothing."""
    run = Run.create(tmp_path / "run", str(save(tmp_path / "model", "bert")), later=True, **SMALL)
    with pytest.raises(ModelError, match="looks ahead"):
        run.train(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(6)))
    assert 0 == run.status()["global_step"]


def keep_as_elsewhere(run: Path) -> None:
    """Make a run's findings those of another release of transformers."""
    found = findings(run)
    assert found is not None
    with Ledger(run / "ledger.sqlite3") as ledger:
        elsewhere = {**found.environment, "transformers": "another"}
        ledger.put(**{FACT: {**found.to_dict(), "environment": elsewhere}})


def test_a_run_of_an_earlier_release_is_proven_at_its_next_start(tmp_path: Path, model: Path) -> None:
    """It has no findings, or those of other libraries; it gets them and goes on, to the same bits as a run that had
    them all along."""
    first = tiny.write_jsonl(tmp_path / "1.jsonl", tiny.chat_rows(6))
    second = tiny.write_jsonl(tmp_path / "2.jsonl", tiny.chat_rows(6, seed=1))
    measured: list[Any] = []
    for name in ("old", "elsewhere", "new"):
        run = Run.create(tmp_path / name, str(model), **SMALL)
        run.train(first)
        here = findings(tmp_path / name)
        if name == "elsewhere":
            keep_as_elsewhere(tmp_path / name)
        if name == "old":
            with Ledger(tmp_path / name / "ledger.sqlite3") as ledger:
                ledger.write("DELETE FROM run WHERE key = ?", FACT)
        run.train(second)
        found = findings(tmp_path / name)
        assert found is not None
        assert here is not None
        assert (found.rows, found.environment) == (here.rows, here.environment)
        assert run.verify(deep=True).ok
        manifest = tmp_path / name / "current_model/checkpoint-4/onward.json"
        measured.append(json.loads(manifest.read_text())["measurement"])
    assert measured[0] == measured[1] == measured[2]


def test_what_is_not_proven_elsewhere_is_refused_before_the_first_step(tmp_path: Path, model: Path) -> None:
    """A run that was proven on another machine is proven again where it trains; one that has trained is only warned."""
    good = findings(make_run(tmp_path / "good", model))
    assert good is not None
    run = Run.create(tmp_path / "run", str(save(tmp_path / "model", "bert")), later=True, **SMALL)
    elsewhere = {**good.environment, "device": "another"}
    with Ledger(run.layout.ledger) as ledger:
        ledger.put(**{FACT: {**good.to_dict(), "environment": elsewhere}})
    with pytest.raises(ModelError, match="looks ahead"):
        run.train(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(6)))
    assert 0 == run.status()["global_step"]


def test_a_run_that_has_trained_goes_on_where_it_cannot_be_proven(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is warned once, and doctor says so too."""
    run = Run.create(tmp_path / "run", str(model), **SMALL)
    run.train(tiny.write_jsonl(tmp_path / "1.jsonl", tiny.chat_rows(4)))
    keep_as_elsewhere(tmp_path / "run")
    assert "it was proven with transformers another (here " in onward("doctor", "--run", tmp_path / "run").out

    def refuse(*_: Any, **__: Any) -> Findings:
        raise ModelError("it looks ahead here", where="model", hint="")

    monkeypatch.setattr("onward.service.admission.admit", refuse)
    for seed in (2, 3):
        run.train(tiny.write_jsonl(tmp_path / f"{seed}.jsonl", tiny.chat_rows(4, seed=seed)))
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        said = [event.message for event in ledger.events(100) if event.kind == "admission"]
    assert ["a new run of this model would be refused: it looks ahead here"] == said
    assert "a new run would be refused: it looks ahead here" in onward("doctor", "--run", tmp_path / "run").out


@pytest.mark.parametrize(
    ("before", "here", "then"),
    [
        ("end to end", "end to end", "end to end"), ("end to end", "padded", "padded"),
        ("padded", "end to end", "padded"), ("padded", "by length", "by length"), ("by length", "padded", "by length"),
    ],
)  # fmt: skip
def test_rows_are_laid_out_as_before_unless_that_is_not_proven_any_more(
    before: str, here: str, then: str, tmp_path: Path, model: Path
) -> None:
    """The layout that asks least of the model is always right; what is left out of the state stays."""
    found = findings(make_run(tmp_path / "run", model))
    assert found is not None
    kept = replace(found, rows=before, left_out=("a",), warnings=("old",), why_padded="then")
    now = kept.confirmed(replace(found, rows=here, left_out=("b",), why_padded="now"))
    assert (then, ("a",), ()) == (now.rows, now.left_out, now.warnings)
    assert ("now" if then == here else "then") == now.why_padded


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_left_out_stays_out(method: str, tmp_path: Path) -> None:
    """Weights that no gradient reaches are no part of the state: it loads again, verifies, and stock PEFT reads it."""
    base = save(tmp_path / "model", "jamba" if method == "lora" else "bart")
    run = Run.create(tmp_path / "run", str(base), method=method, **SMALL)
    left_out = (findings(tmp_path / "run") or pytest.fail("no findings")).left_out
    assert left_out
    for number in (1, 2):
        Run(tmp_path / "run").train(tiny.write_jsonl(tmp_path / f"{number}.jsonl", tiny.chat_rows(5, seed=number)))
    assert run.verify(deep=True).ok
    manifest = json.loads((tmp_path / "run/current_model/checkpoint-4/onward.json").read_text())
    assert 4 == manifest["measurement"]["adam_step"]
    assert [] == [name for name in manifest["parameters"] if any(part in name for part in left_out)]
    if method == "lora":
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(plain, tmp_path / "run" / "current_model")
        assert [] == [name for name, _ in loaded.named_parameters() if "dt_proj.lora" in name]


def test_verify_sees_an_optimizer_that_did_not_count_every_step(tmp_path: Path, model: Path) -> None:
    """Weights without a step of their own make the proof fail, whatever the files' hashes say."""
    run = Run.create(tmp_path / "run", str(model), **SMALL)
    run.train(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(4)))
    checkpoint = tmp_path / "run/current_model/checkpoint-1"
    path = checkpoint / huggingface.OPTIMIZER
    saved = torch.load(path, weights_only=True)
    del saved["state"][0]
    path.unlink()
    torch.save(saved, path)
    manifest = Manifest.model_validate_json((checkpoint / "onward.json").read_bytes())
    files = {**manifest.files, path.name: {"size": path.stat().st_size, "xxh3": xxh3_file(path)}}
    (checkpoint / "onward.json").unlink()
    (checkpoint / "onward.json").write_text(manifest.model_copy(update={"files": files}).sealed().model_dump_json())
    failed = [check for check in run.verify().checks if not check.ok and check.name == "step counters"]
    assert ["the optimizer has not counted the same steps for every weight: some were never trained"] == [
        check.detail for check in failed
    ]
