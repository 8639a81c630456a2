"""Holdouts, replay, the grid and the anchor in whole runs: one process or many, stopped, killed, taken back."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
from commands import assert_refused, onward
from daemons import configure, rows_file
from faults import copy_run
from plain import plain_divergence, plain_model, plain_score
from states import assert_same_state
from transformers import AutoModelForCausalLM

from onward import Run
from onward.atomic import remove_tree
from onward.config import Config
from onward.data.plan.holdout import held_out_rows
from onward.data.tokenized import TokenizedFile
from onward.errors import ConfigError
from onward.events import Event, StepTaken
from onward.hooks.evaluation import WAY, allowance
from onward.layout import RunLayout
from onward.service.knowledge.account import Account
from onward.service.knowledge.anchor import FACT
from onward.service.knowledge.table import GRID
from onward.service.wishes import Wishes
from onward.status import read_grid, read_status
from onward.store.ledger import Ledger

SETTINGS: dict[str, Any] = {
    "batch_size": 4, "max_length": 256, "learning_rate": 1e-2, "holdout": 0.2, "lora": {"rank": 2, "dropout": 0.1},
    "replay": {"share": 0.3, "policy": "forgotten"}, "anchor": {"rows": 4, "tokens": 8, "weight": 0.1},
}  # fmt: skip
ROWS = (11, 6, 9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files."""
    folder = tmp_path_factory.mktemp("files")
    return [
        tiny.write_jsonl(folder / f"{name}.jsonl", tiny.chat_rows(rows, seed=rows))
        for name, rows in zip("abc", ROWS, strict=True)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, files: list[Path]) -> Run:
    """A run of all three files in one process; every test must leave it as it is."""
    run = Run.create(tmp_path_factory.mktemp("whole") / "run", str(model), **SETTINGS)
    run.train(*files)
    return run


def test_rows_are_counted_apart(whole: Run) -> None:
    """History and proof count trained, held-out and replayed rows apart; trained again, scores are equal too."""
    counts = [(entry["rows"], entry["rows_trained"], entry["rows_held_out"]) for entry in whole.history()]
    assert [(11, 9, 2), (6, 5, 1), (9, 8, 1)] == counts
    assert [0, 1, 2] == [entry["rows_replayed"] for entry in whole.history()]
    proof = whole.verify(deep=True)
    assert [] == [check for check in proof.checks if not check.ok]
    rows = next(check.detail for check in proof.checks if check.name == "rows")
    assert ["22 rows trained", "4 held out", "3 rows replayed"] == re.findall(
        r"22 rows \w+|4 held out|3 rows \w+", rows
    )


def test_scores_are_compared_with_those_of_the_same_way(tmp_path: Path, model: Path, files: list[Path]) -> None:
    """Another score than is computed again fails the proof; scores of a release that computed otherwise do not."""
    run = Run.create(tmp_path / "run", str(model), **SETTINGS)
    run.train(*files[:2])
    outcomes: list[list[str]] = []
    for way in (WAY, None):
        with Ledger(run.layout.ledger) as ledger:
            row = ledger.files("done")[-1]
            scores = ledger.boundary_results(row.id)["grid"]
            changed = {**scores, "cost": scores["cost"] + 1, "way": way}
            ledger.keep_boundary_results(row.id, run.status()["global_step"], {"grid": changed})
        outcomes.append([check.name for check in run.verify(deep=True).checks if not check.ok])
    assert [["replay"], []] == outcomes


def test_rows_that_were_ever_trained_are_not_measured_as_held_out(
    tmp_path: Path, model: Path, files: list[Path]
) -> None:
    """A content is measured on the rows that each of its trainings held out, and on trained ones if none did."""
    run = Run.create(tmp_path / "run", str(model), **{**SETTINGS, "replay": {"share": 0}, "anchor": {"rows": 0}})
    never_trained, found = set(range(ROWS[0])), list[tuple[int, bool]]()
    for share in (0.4, 0.2, 0.4, 0):
        configure(run, holdout=share)
        run.train(files[0], again=True)
        with Ledger(run.layout.ledger) as ledger:
            row = ledger.files("done")[-1]
            score = ledger.boundary_results(row.id)[GRID]["model"][row.sha256]
        never_trained &= set(held_out_rows(run.config.seed, row.sha256, row.rows, row.held_out))
        assert set(score["rows"]) == (never_trained or set(range(row.rows)))
        found.append((len(score["rows"]), score["trained"]))
    assert [(4, False), (2, False), (2, False), (11, True)] == found


def test_the_proof_recomputes_what_was_replayed(whole: Run) -> None:
    """A replayed row that was recorded otherwise than its choice says fails the proof, by file."""
    with Ledger(whole.layout.ledger) as ledger:
        (step, sha256, row) = ledger.replayed_rows(ledger.files("done")[1].id)[0]
        assert ledger.files("done")[0].sha256 == sha256
        ledger.write("UPDATE replayed_rows SET row = row + 1 WHERE step = ?", step)
        failed = [check.detail for check in whole.verify().checks if not check.ok]
        ledger.write("UPDATE replayed_rows SET row = ? WHERE step = ?", row, step)
    assert ["file 2 (b.jsonl): the rows recorded as replayed are not those that were chosen"] == failed


@pytest.mark.slow
def test_several_processes_are_one(whole: Run, model: Path, files: list[Path], tmp_path: Path) -> None:
    """Stopped at each step, in a process for each file, killed while it measures: states and grid are equal."""
    run = Run.create(tmp_path / "run", str(model), **SETTINGS)
    wishes = Wishes()
    run.train(files[0], stop=wishes, observe=stopping(wishes, at=2))
    run.train()
    assert -signal.SIGKILL == processes.apart(train_until_measured, run.layout.root, files[1])
    assert "evaluating" == read_ledger_state(run)
    run.train()
    for folder in (*run.layout.tokens.iterdir(), *run.layout.samples.iterdir()):
        remove_tree(folder)  # replayed rows are read again from the archive, and those that are measured
    texts, distributions = sorted(run.layout.anchor.iterdir())
    (texts / "tokens.bin").write_bytes(bytes(texts.joinpath("tokens.bin").stat().st_size))
    distributions.write_bytes(b"")
    assert 0 == processes.train(run.layout.root, files[2:])
    assert_same_state(whole.layout.root, run.layout.root)
    assert read_grid(whole.layout) == read_grid(run.layout)


def test_a_stop_comes_before_the_measurement(whole: Run, model: Path, files: list[Path], tmp_path: Path) -> None:
    """A stop asked for at a boundary is honoured at once; the next process measures what is owed."""
    run = Run.create(tmp_path / "run", str(model), **SETTINGS)
    wishes = Wishes()
    run.train(*files, stop=wishes, observe=stopping(wishes, at=3))
    assert (3, [0, 1], None) == (run.status()["global_step"], read_grid(run.layout)["after"], value_at(run, 1, 0))
    run.train()
    assert_same_state(whole.layout.root, run.layout.root)
    assert read_grid(whole.layout) == read_grid(run.layout)
    wishes = Wishes()
    run.train(files[0], again=True, stop=wishes, observe=stopping(wishes, at=whole.status()["global_step"] + 3))
    assert value_at(run, 4, 0) is None
    run.train()  # nothing waits but the measurement
    assert value_at(run, 4, 0) is not None
    assert run.verify().ok


@pytest.mark.slow
def test_going_back_and_leaving_out(whole: Run, model: Path, files: list[Path], tmp_path: Path) -> None:
    """Rolled back and trained again, rebuilt without a file that was replayed: as a run that never knew it."""
    run = Run.create(tmp_path / "run", str(model), **SETTINGS)
    run.train(*files)
    run.rollback("a.jsonl", requeue=True)
    assert [0, 1] == read_grid(run.layout)["after"]
    run.train()
    assert_same_state(whole.layout.root, run.layout.root)
    assert read_grid(whole.layout) == read_grid(run.layout)
    run.rebuild("a.jsonl")
    never = Run.create(tmp_path / "never", str(model), **SETTINGS)
    never.train(*files[1:])
    assert_same_state(never.layout.root, run.layout.root)
    assert read_grid(never.layout) == read_grid(run.layout)
    assert run.verify(deep=True).ok


def test_measuring_changes_no_bit(model: Path, files: list[Path], tmp_path: Path) -> None:
    """The same run without evaluation has the same states."""
    settings = {**SETTINGS, "replay": {"share": 0.3}, "anchor": {"rows": 4, "tokens": 8}}
    runs = [
        Run.create(tmp_path / str(share), str(model), **settings, evaluation={"share": share}) for share in (0, 0.05)
    ]
    for run in runs:
        run.train(*files[:2])
    assert_same_state(*(run.layout.root for run in runs))
    assert [[0, 1, 2], [None] * 3] == [read_grid(runs[0].layout)["after"], read_grid(runs[0].layout)["anchor"]]


def test_anchor_texts_that_the_base_does_not_write_again_are_missed(
    whole: Run, files: list[Path], tmp_path: Path
) -> None:
    """Texts that are gone are written again; where that gives others, as on another machine, nothing is trained."""
    run = copy_run(whole.layout.root, tmp_path / "run")
    with Ledger(RunLayout(run).ledger) as ledger:
        ledger.put(**{FACT: dict.fromkeys(ledger.get(FACT), "0" * 32)})
    refused = onward("train", "--run", run, rows_file(tmp_path / "more.jsonl", 4))
    assert_refused(refused, 5, "the base writes other ones here", "Put 4x8-", "back from a copy", "onward skip")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_grid_is_what_plain_transformers_computes(
    method: str, model: Path, files: list[Path], tmp_path: Path
) -> None:
    """From restore points, with rows and texts as they are stored: loss, accuracy and divergence from the base."""
    settings = {**SETTINGS, "method": method, "replay": {"share": 0.3}}
    run = Run.create(tmp_path / "run", str(model), **settings)
    run.train(*files[:2])
    grid = read_grid(run.layout)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    stored = list((run.layout.cache / "samples").iterdir())
    for column, file in enumerate(grid["files"]):
        sample = TokenizedFile.open(next(path for path in stored if f"{file['sha256']}" in meta_of(path)))
        loss, accuracy = plain_score(base, sample)
        assert (loss, accuracy) == pytest.approx((grid["loss"][0][column], grid["accuracy"][0][column]), rel=1e-5)
        for row, point in enumerate(reversed(run.layout.restore_points()[:-1]), start=1):
            if grid["loss"][row][column] is not None:
                loss, accuracy = plain_score(plain_model(point, model, method), sample)
                measured = grid["loss"][row][column], grid["accuracy"][row][column]
                assert (loss, accuracy) == pytest.approx(measured, rel=1e-5)
    texts = TokenizedFile.open(next(run.layout.anchor.glob("4x8-*[0-9a-f]")))
    last = plain_model(run.layout.restore_points()[0], model, method)
    assert plain_divergence(base, last, texts) == pytest.approx(grid["anchor"][2], rel=1e-3)
    assert 0.0 == grid["anchor"][0]


def test_questions_of_a_user(model: Path, files: list[Path], tmp_path: Path) -> None:
    """Files of `evaluation.files` are columns and never trained; a missing one is refused before the first step.

    One with the content of a file of the stream is measured on that file's held-out rows.
    """
    asked = {"share": 0.05, "files": ["general.jsonl", "same.jsonl"]}
    settings: dict[str, Any] = {**SETTINGS, "evaluation": asked, "anchor": {"rows": 0}}
    run = Run.create(tmp_path / "run", str(model), **settings)
    (run.layout.root / "same.jsonl").write_bytes(files[0].read_bytes())
    with pytest.raises(ConfigError, match="a file to measure on cannot be read"):
        run.train(files[0])
    assert 0 == run.status()["global_step"]
    tiny.write_jsonl(run.layout.root / "general.jsonl", tiny.chat_rows(3, seed=99))
    run.train()
    grid = onward("grid", "--run", run.layout.root, "--json").json
    names = [(1, "a.jsonl"), (None, "general.jsonl"), (None, "same.jsonl")]
    assert names == [(file["position"], file["name"]) for file in grid["files"]]
    held_out = [sorted(grid["files"][place]["rows"]) for place in (0, 2)]
    assert [list(held_out_rows(0, grid["files"][0]["sha256"], 11, 2))] * 2 == held_out
    assert [None, None] == grid["anchor"]
    assert all(value is not None for row in grid["loss"] for value in row)
    assert [row[0] for row in grid["loss"]] == [row[2] for row in grid["loss"]]
    assert 9 == sum(entry["rows_trained"] for entry in run.history())
    seen = onward("evaluate", "--run", run.layout.root, "--at", "a.jsonl", "--json").json
    assert [(1, grid["loss"][1][0]), (None, grid["loss"][1][1])] == [
        (file["position"], file["loss"]) for file in sorted_by(grid, seen["files"])
    ]
    drawn = onward("grid", "--run", run.layout.root, "--svg", tmp_path / "grid.svg", "--csv")
    assert (0, 3) == (drawn.status, len(drawn.out.splitlines()))
    assert (tmp_path / "grid.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_questions_that_are_gone(model: Path, files: list[Path], tmp_path: Path) -> None:
    """A file of `evaluation.files` that vanishes in the middle of a file leaves blanks, and fails no proof.

    The config of a file that has begun cannot be changed any more, so a refusal would have no way out.
    """
    settings: dict[str, Any] = {
        **SETTINGS,
        "evaluation": {"share": 0.05, "files": ["general.jsonl"]},
        "anchor": {"rows": 0},
    }
    run = Run.create(tmp_path / "run", str(model), **settings)
    general = tiny.write_jsonl(run.layout.root / "general.jsonl", tiny.chat_rows(3, seed=99))
    run.train(files[0])

    def remove(event: Event) -> None:
        if isinstance(event, StepTaken):
            general.unlink(missing_ok=True)

    run.train(files[1], observe=remove)
    grid = read_grid(run.layout)
    assert [True, True, False] == [row[2] is not None for row in grid["loss"]]
    assert_refused(onward("evaluate", "--run", run.layout.root), 2, "cannot be read", "general.jsonl")
    tiny.write_jsonl(general, tiny.chat_rows(3))
    proof = run.verify(deep=True)
    assert proof.ok
    assert proof.checks[-1].detail.endswith("not measured again, since evaluation.files have changed: b.jsonl")
    configure(run, evaluation={"share": 0.05})
    assert [1, 2] == [file["position"] for file in onward("evaluate", "--run", run.layout.root, "--json").json["files"]]


def test_what_does_not_fit_is_blank(whole: Run) -> None:
    """The allowance grows with training and falls with measuring, and decides by counted tokens alone."""
    lora, full = (Config.model_validate({"method": m, "evaluation": {"share": 0.05}}) for m in ("lora", "full"))
    assert 5 == allowance(lora, 0, 10**9, 10**8)  # what is free whatever was spent
    assert 8_750 - 4_000 == allowance(lora, 100_000, 4_000, 10**8)
    assert 15_000 - 4_000 == allowance(full, 100_000, 4_000, 10**8)
    with Ledger(whole.layout.ledger, read_only=True) as ledger:
        first = ledger.at_position(1)
        assert first is not None
        assert Account(ledger).up_to(1).cost == ledger.boundary_results(first.id)["grid"]["cost"]


def stopping(wishes: Wishes, at: int) -> Any:
    """Ask for a stop when a step was taken."""

    def observe(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == at:
            wishes.ask("a test")

    return observe


class Killing(Wishes):
    """Kills its process while the run is being measured, between two forward passes."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._run = Run(run)

    def check(self) -> None:
        """Called between two forward passes and wherever work may be left."""
        if read_status(self._run.layout)["state"] == "evaluating" and self._run.status()["file_step"]:
            os.kill(os.getpid(), signal.SIGKILL)
        super().check()


def train_until_measured(run: Path, file: Path) -> None:
    """Train a file until its boundary is being measured."""
    torch.set_num_threads(1)
    Run(run).train(file, stop=Killing(run))


def read_ledger_state(run: Run) -> str:
    """The state that the process showed last."""
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        return str(ledger.get("state"))


def value_at(run: Run, row: int, column: int) -> float | None:
    """A loss of the grid."""
    return read_grid(run.layout)["loss"][row][column]


def sorted_by(grid: dict[str, Any], files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return files in the order of the grid's columns."""
    order = [file["sha256"] for file in grid["files"]]
    return sorted(files, key=lambda file: order.index(file["sha256"]))


def meta_of(folder: Path) -> str:
    """Return the text of a tokenized file's meta.json."""
    return (folder / "meta.json").read_text()
