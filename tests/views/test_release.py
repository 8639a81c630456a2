"""Releases: made on a branch, from what the run has committed; the run is never touched."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import tiny
import torch
from commands import onward, snapshot
from daemons import configure
from faults import Fault
from processes import command, open_descriptors
from safetensors.torch import load_file
from states import assert_same_state

from onward import Run
from onward.errors import DamagedState, UsageError, VerificationFailed
from onward.events import Event, StepTaken
from onward.service.lock import RunLock
from onward.service.wishes import Stopped, Wishes
from onward.training.checkpoints.checkpoint import inspect_checkpoint
from onward.training.model import weights
from onward.views.evaluate import measure
from onward.views.export.export import Wanted, export
from onward.views.points import hold
from onward.views.release import Making, Order
from onward.views.releases import RECORD, list_releases, remove_release

SETTINGS: dict[str, Any] = {
    "batch_size": 4, "max_length": 256, "learning_rate": 1e-2, "lora": {"rank": 4},
    "evaluation": {"files": ["gone.jsonl"]},
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    """A run of three files, of 3, 4 and 2 steps; a file that it was measured on is gone."""
    folder = tmp_path_factory.mktemp("release")
    run = Run.create(folder / "run", str(model), **SETTINGS)
    gone = tiny.write_jsonl(run.layout.root / "gone.jsonl", tiny.chat_rows(1))
    run.train(*(tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (9, 14, 6)))
    gone.unlink()
    configure(run, evaluation={"share": 0.05})
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of that run."""
    return Run(shutil.copytree(trained.layout.root, tmp_path / "run"))


def make(run: Run, order: Order, seen: list[StepTaken] | None = None, wishes: Wishes | None = None) -> dict[str, Any]:
    """Make a release."""

    def observe(event: Event) -> None:
        if seen is not None and isinstance(event, StepTaken):
            seen.append(event)

    return Making(run.layout, observe, lambda _: None, wishes or Wishes()).release(order)


def test_a_release_leaves_the_run_as_it_is(run: Run, trained: Run, tmp_path: Path) -> None:
    """Made while another process owns the run, it changes no file of it; trained on, the run is as without."""
    before = snapshot(run.layout.root)
    with RunLock(run.layout.lock):
        make(run, Order("v1"))
    assert before == snapshot(run.layout.root)
    twin = Run(shutil.copytree(trained.layout.root, tmp_path / "twin"))
    more = tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(7, seed=9))
    for each in (run, twin):
        each.train(more)
    assert_same_state(twin.layout.root, run.layout.root)
    assert run.verify(deep=True).ok


def test_a_cooldown_decays_over_the_stream_and_is_repeatable(run: Run) -> None:
    """The rate falls to almost nothing over so many steps; the same order gives the same bits under any name."""
    seen: list[StepTaken] = []
    one, same = make(run, Order("a", "step:7", 5), seen), make(run, Order("b", "14.jsonl", 5))
    assert [8, 9, 10, 11, 12] == [step.step for step in seen]
    rates = [step.learning_rate for step in seen]
    assert rates == sorted(rates, reverse=True)
    assert 1e-2 > rates[0] > rates[-1] > 0
    assert (one["weights"], 7, 2) == (same["weights"], same["step"], len(same["stream"]))
    here, there = (run.layout.releases / name / WEIGHTS for name in "ab")
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.slow
def test_a_cooldown_has_the_loss_of_the_run(run: Run, tmp_path: Path) -> None:
    """The steps of a cooldown are held to the base as those of the files are, if the anchor has a weight."""
    text = run.layout.config.read_text()
    for key, value in (("rows", 2), ("tokens", 4), ("weight", 0.5)):
        text = re.sub(rf"(?s)(\nanchor:\n.*?  {key}: )[\d.]+", rf"\g<1>{value}", text, count=1)
    run.layout.config.write_text(text)
    run.train(tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(4, seed=9)))
    seen: list[StepTaken] = []
    make(run, Order("v1", cooldown=2), seen)
    assert [11, 12] == [step.step for step in seen]
    assert all(step.anchor is not None and step.anchor > 0 for step in seen)


def test_without_a_cooldown_it_is_the_boundary(run: Run) -> None:
    """Zero steps release the state of the boundary itself, in the very bytes of its weights."""
    assert make(run, Order("plain", cooldown=0))["verified"]
    assert (run.layout.boundary(9) / WEIGHTS).read_bytes() == (run.layout.releases / "plain" / WEIGHTS).read_bytes()


def test_an_average_is_the_mean_of_boundaries(run: Run) -> None:
    """Each weight is the mean of that weight over the last boundaries, rounded once."""
    assert [3, 7, 9] == make(run, Order("mean", average=3))["averaged"]
    older = make(run, Order("older", "step:7", 1, average=2))
    assert ([3, 7], 7, 1) == (older["averaged"], older["step"], older["cooldown"]["steps"])
    states = [load_file(run.layout.boundary(step) / WEIGHTS) for step in (3, 7, 9)]
    found = load_file(run.layout.releases / "mean" / WEIGHTS)
    for name, weight in found.items():
        mean = sum(state[name].double() for state in states) / 3
        assert torch.equal(mean.to(weight.dtype), weight), name


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (Order("../x"), "cannot be the name"),
        (Order(".x"), "cannot be the name"),
        (Order("taken"), "a release of this name already exists"),
        (Order("x", average=9), "3 boundaries are kept"),
        *(
            (Order("x", cooldown=steps), "a number of steps, or a share")
            for steps in (1.5, -1, -0.5, math.nan, math.inf)
        ),
        (Order("x", "none.jsonl"), "neither a finished file nor the step"),
    ],
)
def test_what_cannot_be_released_is_refused(order: Order, reason: str, run: Run) -> None:
    """Names that are taken or are paths, boundaries that are not there and lengths that are none leave nothing, and are
    refused before anything is copied.
    """
    (run.layout.releases / "taken").mkdir(parents=True)
    said: list[str] = []
    with pytest.raises(UsageError, match=reason):
        Making(run.layout, lambda _: None, said.append, Wishes()).release(order)
    assert ["taken"] == [path.name for path in run.layout.releases.iterdir()]
    assert [] == said


@pytest.mark.parametrize("taken", [0, 1, 9, 39, 40, 45, 55, 1000])
def test_the_length_of_a_cooldown(taken: int) -> None:
    """A number of steps, a share of those so far and at least one, or else a tenth and at least four; an average has
    none unless it is asked for.
    """
    assert max(4, round(taken / 10)) == Order("x").steps_of(taken)
    assert 0 == Order("x", average=2).steps_of(taken)
    assert max(1, round(taken / 5)) == Order("x", cooldown=0.2, average=2).steps_of(taken)
    assert [0, 1, 7] == [Order("x", cooldown=steps).steps_of(taken) for steps in (0, 1.0, 7)]


def test_a_stop_leaves_nothing(run: Run) -> None:
    """Stopped in the cooldown, there is no release, nor a part of one, nor the copy."""
    wishes, seen = Wishes(), list[Event]()

    def stop(event: Event) -> None:
        seen.append(event)
        wishes.ask("test")

    with pytest.raises(Stopped):
        Making(run.layout, stop, lambda _: None, wishes).release(Order("v1", cooldown=5))
    assert 1 == len(seen)
    assert not run.layout.releases.exists()
    assert [] == list((run.layout.cache / "reading").iterdir())


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("words", [("release", "v1"), ("compare", "batch_size=2", "batch_size=3")], ids=" ".join)
def test_a_signal_ends_a_command_in_a_line(words: tuple[str, ...], number: str, run: Run, tmp_path: Path) -> None:
    """What works on a copy of the run leaves nothing of it, and says so."""
    before, output = snapshot(run.layout.root), tmp_path / "output"
    kind = Fault(3, number, tmp_path / "record")
    assert 1 == command(output, *words, "--run", run.layout.root, prepare=kind)
    assert kind.struck.exists()
    said = f"onward: stopped by {number}\n  Nothing of it is left, and the run is unchanged.\n"
    assert output.read_text().endswith(said)
    assert before == snapshot(run.layout.root)


@pytest.mark.parametrize(
    ("name", "problem"),
    [(WEIGHTS, f"{WEIGHTS} was changed"), ("tokenizer.json", "tokenizer.json was changed"), ("README.md", None)],
)
def test_a_release_that_is_not_what_was_published_is_not_used(name: str, problem: str | None, run: Run) -> None:
    """One byte of what computes, or a missing file of it; the model card is for people, who may edit it."""
    make(run, Order("v1", cooldown=0))
    file = run.layout.releases / "v1" / name
    data = file.read_bytes()
    for changed in (data[:-1] + bytes([data[-1] ^ 1]), None):
        file.unlink(missing_ok=True)
        if changed is not None:
            file.write_bytes(changed)
        if problem is None:
            with hold(run.layout, "v1") as point:
                assert "v1" == point.release
            continue
        with pytest.raises(DamagedState, match=problem), hold(run.layout, "v1"):
            pass


def test_the_record_says_what_is_released_and_the_card_shows_it(run: Run) -> None:
    """Which state of which stream, and what was measured of it: as much as `onward evaluate` measures there."""
    before = open_descriptors()
    record = make(run, Order("v1", "step:7", cooldown=0, notes="for *you*\udcff"))
    assert before == open_descriptors()
    assert record == json.loads((run.layout.releases / "v1" / RECORD).read_bytes())
    manifest = inspect_checkpoint(run.layout.boundary(7)).verified
    assert manifest is not None
    assert {
        "name": "v1", "notes": "for *you*\\udcff", "run": manifest.run, "step": 7,
        "state_digest": manifest.state_digest,
        "base": manifest.base, "config": manifest.config, "cooldown": {"steps": 0, "learning_rate": None},
        "averaged": [7], "verified": True,
    }.items() <= record.items()  # fmt: skip
    assert [(1, "9.jsonl", 9), (2, "14.jsonl", 14)] == [
        (file["position"], file["name"], file["rows"]) for file in record["stream"]
    ]
    seen, measured = measure(run.layout, "step:7"), record["measured"]
    assert (seen["files"], seen["anchor"]) == (measured["files"], measured["anchor"])
    assert fmean(file["loss"] for file in seen["files"]) == pytest.approx(measured["average"], rel=1e-12)
    card = (run.layout.releases / "v1" / "README.md").read_text()
    for words in ("v1: for *you*", f"{measured['average']:.4f}", f"{measured['anchor']:.4f}"):
        assert words in card
    assert ("Average of the states" in card, "Cooldown" in card) == (False, False)
    export(run.layout, Wanted(run.layout.root / "out", "merged", "v1"))
    exported = (run.layout.root / "out" / "README.md").read_text()
    assert exported.startswith(card), "of what was released, not of the run as it is now"
    assert "| Format | merged |" in exported


def test_a_release_of_the_base_has_nothing_to_be_measured_on(run: Run) -> None:
    """It has no file, so no score, and no row that a cooldown could take."""
    nothing = {"mean": None, "worst": None, "file": None}
    record = make(run, Order("base", "step:0", cooldown=0))
    assert {"files": [], "average": None, "forgetting": nothing, "anchor": None} == record["measured"]
    assert [] == record["stream"]
    assert "not measured" in (run.layout.releases / "base" / "README.md").read_text()
    with pytest.raises(UsageError, match="nothing has been trained yet"):
        make(run, Order("cooled", "step:0"))


def test_a_release_that_is_written_wrongly_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one weight: nothing is left of it."""
    write = weights.save_file

    def write_wrongly(tensors: dict[str, torch.Tensor], path: Any, **options: Any) -> None:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        next(iter(changed.values())).view(torch.int32).flatten()[0] ^= 1
        write(changed, path, **options)

    monkeypatch.setattr(weights, "save_file", write_wrongly)
    with pytest.raises(VerificationFailed):
        make(run, Order("v1", cooldown=0))
    assert not run.layout.releases.exists()


def test_two_releases_of_one_name_never_mix(run: Run) -> None:
    """While one is made another is done: the name is that one's, whole, and the first is refused and leaves nothing."""
    made: list[dict[str, Any]] = []

    def meanwhile(line: str) -> None:
        if line == "measuring it":
            made.append(make(run, Order("v1", cooldown=1)))

    with pytest.raises(UsageError, match="a release of this name already exists"):
        Making(run.layout, lambda _: None, meanwhile, Wishes()).release(Order("v1"))
    assert ["v1"] == [path.name for path in run.layout.releases.iterdir()]
    assert made[0]["weights"] == json.loads((run.layout.releases / "v1" / RECORD).read_bytes())["weights"]


def test_a_release_that_cannot_be_written_computes_nothing(run: Run) -> None:
    """Where its folder cannot be made, that is said before the first step of the cooldown, not after the last."""
    run.layout.releases.write_text("")
    seen: list[StepTaken] = []
    with pytest.raises(OSError, match="exists"):
        make(run, Order("v1"), seen)
    assert [] == seen
    assert "" == run.layout.releases.read_text()


def test_releases_are_listed_and_removed_but_never_with_what_others_put_there(run: Run) -> None:
    """The list has what Onward made, the oldest first; a folder that holds more is not removed."""
    for name in ("first", "second"):
        make(run, Order(name, cooldown=0))
    (run.layout.releases / "mine").mkdir()
    assert ["name", "first", "second"] == [
        line.split()[0] for line in onward("releases", "--run", run.layout.root).out.splitlines()
    ]
    assert ["first", "second"] == [release.name for release in list_releases(run.layout)]
    note = run.layout.releases / "first" / "notes.txt"
    note.write_text("keep")
    with pytest.raises(UsageError, match=r"not made by Onward: notes\.txt"):
        remove_release(run.layout, "first")
    assert "keep" == note.read_text()
    outcome = onward("releases", "--run", run.layout.root, "--remove", "second", "--yes", "--json")
    assert ["first"] == [release["name"] for release in outcome.json]
    assert 2 == onward("releases", "--run", run.layout.root, "--remove", "mine", "--yes").status
