"""The guard: a file that harms the model is warned of or taken back, and then it is as if it had never come."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import onward
from daemons import configure
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.config import Config
from onward.config.text import read_config
from onward.data.plan.order import make_plan
from onward.errors import FileRejected, UsageError
from onward.events import Event, StepTaken
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger

SETTINGS: dict[str, Any] = {"batch_size": 4, "max_length": 128, "learning_rate": 0.02, "lora": {"rank": 4}}
STRICT = {"action": "reject", "forgetting": 0.01, "spike": 0, "answers": 0}


def spoken(text: str, count: int) -> list[dict[str, Any]]:
    """Rows that answer everything with one text."""
    chats = ([{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": text}] for n in range(count))
    return [{"messages": messages} for messages in chats]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers: one forgets too little."""
    return tiny.save_tiny_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two good files, and one that says a single word over and over."""
    folder = tmp_path_factory.mktemp("files")
    rows = {"a": tiny.chat_rows(40, seed=1), "b": tiny.chat_rows(30, seed=2), "bad": spoken("zz zz " * 10, 100)}
    return {name: tiny.write_jsonl(folder / f"{name}.jsonl", some) for name, some in rows.items()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, model: Path, files: dict[str, Path]) -> Run:
    """A run that has trained a good file under strict limits."""
    run = Run.create(tmp_path_factory.mktemp("guard") / "run", str(model), guard=STRICT, **SETTINGS)
    run.train(files["a"])
    return run


@pytest.fixture
def run(begun: Run, tmp_path: Path) -> Run:
    """A copy of that run."""
    return Run(shutil.copytree(begun.layout.root, tmp_path / "run"))


def states(run: Run) -> list[tuple[str, str]]:
    """Name and state of each file, in the order of the history."""
    return [(entry["name"], entry["state"]) for entry in run.history()]


def set_guard(run: Run, **values: Any) -> None:
    """Change keys of the guard in the config."""
    text = run.layout.config.read_text(encoding="utf-8")
    for key, value in values.items():
        lines = [f"  {key}: {value}" if line.startswith(f"  {key}:") else line for line in text.splitlines()]
        text = "\n".join(lines)
    run.layout.config.write_text(text, encoding="utf-8")


def test_a_harmful_file_is_as_if_it_had_never_come(
    run: Run, begun: Run, files: dict[str, Path], tmp_path: Path
) -> None:
    """It is taken back and quarantined, the queue goes on, and weights, moments and proof are those without it."""
    twin = Run(shutil.copytree(begun.layout.root, tmp_path / "twin"))
    outcome = onward("train", files["bad"], files["b"], "--run", run.layout.root)
    twin.train(files["b"])
    assert_same_state(twin.layout.root, run.layout.root)
    assert ("bad.jsonl", "quarantined") in states(run)
    assert run.verify(deep=True).ok
    assert 3 == outcome.status, outcome.err
    report = json.loads((run.layout.rejected / "bad.jsonl.report.json").read_text(encoding="utf-8"))
    assert "a.jsonl" in report["problems"][0]["reason"]
    assert report["problems"][0]["reason"].startswith("loss on file 1 grew by")
    assert {"line", "reason", "remedy"} == set(report["problems"][1])
    assert all(1 <= problem["line"] <= 100 for problem in report["problems"][1:])
    assert "onward accept bad.jsonl trains it anyway" == report["way_out"]


def test_a_file_that_says_one_thing_is_taken_back_before_its_first_step(
    run: Run, begun: Run, files: dict[str, Path], tmp_path: Path
) -> None:
    """With the limits that `init` writes; the good file after it trains as if it had never come."""
    set_guard(run, forgetting=0.1, spike=4.0, answers=2.0)
    twin = Run(shutil.copytree(begun.layout.root, tmp_path / "twin"))
    taken: list[int] = []
    with pytest.raises(FileRejected, match="all say the same"):
        run.train(
            files["bad"], observe=lambda event: taken.append(event.step) if isinstance(event, StepTaken) else None
        )
    assert [] == taken
    for each in (run, twin):
        each.train(files["b"])
    assert_same_state(twin.layout.root, run.layout.root)
    assert {("bad.jsonl", "quarantined"), ("b.jsonl", "done")} == set(states(run)[1:])
    assert run.verify(deep=True).ok
    run.accept("bad.jsonl")
    assert "done" == run.train()[0]["state"]


def letters(seed: int, count: int) -> list[tuple[str, str]]:
    """A letter as a question, and the letter after it with the letter itself as its answer."""
    asked = random.Random(seed).choices("abcdefghijklmnop", k=count)
    return [(letter, chr(ord(letter) + 1) + letter) for letter in asked]


def answered(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A chat for each pair of a question and an answer."""
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


def shuffled(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same questions and answers, in other pairs."""
    answers = [answer for _, answer in pairs]
    random.Random(0).shuffle(answers)
    return [(question, answer) for (question, _), answer in zip(pairs, answers, strict=True)]


def test_shuffled_answers_are_taken_back_before_their_first_step(tmp_path: Path) -> None:
    """A model that has learnt what answers depend on tells; the good file after it trains as if it had never come."""
    rows = {"learnt": letters(1, 800), "noise": shuffled(letters(2, 64)), "good": letters(3, 64)}
    paths = {name: tiny.write_jsonl(tmp_path / f"{name}.jsonl", answered(some)) for name, some in rows.items()}
    settings = {"method": "full", "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0, "holdout": 0}
    guard = {"action": "reject", "spike": 0, "anchor": 9.0, "forgetting": 0.5}
    run = Run.create(tmp_path / "run", str(tiny.save_tiny_model(tmp_path / "model")), guard=guard, **settings)
    run.train(paths["learnt"])
    twin = Run(shutil.copytree(run.layout.root, tmp_path / "twin"))
    with pytest.raises(FileRejected, match="its answers fit the questions of other rows as well as their own"):
        run.train(paths["noise"])
    for each in (run, twin):
        each.train(paths["good"])
    assert_same_state(twin.layout.root, run.layout.root)
    assert [("learnt.jsonl", "done"), ("good.jsonl", "done"), ("noise.jsonl", "quarantined")] == states(run)
    assert run.verify().ok


def test_an_accepted_file_is_trained(run: Run, files: dict[str, Path]) -> None:
    """`accept` queues it again, and the guard lets it pass with a warning; what is not quarantined is refused."""
    with pytest.raises(FileRejected, match="loss on file 1 grew"):
        run.train(files["bad"])
    with pytest.raises(UsageError, match=r"a\.jsonl"):
        run.accept("a.jsonl")
    assert 0 == onward("accept", "bad.jsonl", "--run", run.layout.root).status
    assert [("bad.jsonl", "done")] == [(entry["name"], entry["state"]) for entry in run.train()]
    with Ledger(run.layout.ledger) as ledger:
        warnings = [event.message for event in ledger.events() if event.kind == "guard"]
    assert warnings
    assert all(message.endswith("(accepted)") for message in warnings)
    with pytest.raises(UsageError):
        run.accept("bad.jsonl")
    assert run.verify().ok


def test_a_warning_changes_no_bit(run: Run, begun: Run, files: dict[str, Path], tmp_path: Path) -> None:
    """With `warn`, the file is trained as with the guard off, and its effect is reported."""
    twin = Run(shutil.copytree(begun.layout.root, tmp_path / "twin"))
    set_guard(run, action="warn")
    set_guard(twin, action="off")
    told: list[Event] = []
    run.train(files["bad"], observe=told.append)
    twin.train(files["bad"])
    assert_same_state(twin.layout.root, run.layout.root)
    assert any("loss on file 1 grew" in str(getattr(event, "message", "")) for event in told)


UNMEASURED: dict[str, Any] = {**SETTINGS, "evaluation": {"share": 0}, "anchor": {"rows": 4, "tokens": 8}}
TINY_STEPS: dict[str, Any] = {"learning_rate": 1e-6, "evaluation": {"share": 0.5}, "anchor": {"rows": 4, "tokens": 8}}


def distance(run: Run) -> float:
    """The KL divergence of a run's state from its base."""
    return float(onward("evaluate", "--run", run.layout.root, "--json").json["anchor"])


def strict_anchor(limit: float) -> dict[str, Any]:
    """A guard that only judges how far the model moves away from its base."""
    return {"action": "reject", "anchor": limit, "forgetting": 0, "spike": 0, "answers": 0}


def test_a_file_is_not_blamed_for_how_far_the_run_moved_before_it(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """A file that moves the model by next to nothing is trained, however far the model is from its base.

    That is so in a run that is measured from its third file on, and in one that begins from an adapter.
    """
    run = new_run(tmp_path / "run", model, **UNMEASURED)
    run.train(files["a"], files["b"])
    moved = distance(run)
    configure(run, guard=strict_anchor(0.9 * moved), **TINY_STEPS)
    more = [tiny.write_jsonl(tmp_path / f"{rows}.jsonl", tiny.chat_rows(rows, seed=rows)) for rows in (5, 6)]
    assert ["done", "done"] == [entry["state"] for entry in run.train(*more)]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in run.layout.current.glob("adapter_*"):
        shutil.copy(path, adapter)
    begun_with: dict[str, Any] = {**TINY_STEPS, "adapter": str(adapter), "guard": strict_anchor(0.9 * moved)}
    begun = Run.create(tmp_path / "begun", str(model), max_length=128, **begun_with)
    assert ["done"] == [entry["state"] for entry in begun.train(more[0])]
    settings: dict[str, Any] = {**UNMEASURED, "evaluation": {"share": 0.5}, "guard": strict_anchor(1e-9)}
    with pytest.raises(FileRejected, match="KL from the base grew by"):
        new_run(tmp_path / "first", model, **settings).train(files["b"])


def leaving(path: Path, config: Config) -> Path:
    """A file whose rows say one thing but for three of others, which come one after the other when it is trained."""
    others = tiny.chat_rows(3, seed=3)
    for number in count():
        rows = [{**row, "number": number} for row in (*others, *spoken("zz zz " * 10, 40))]
        tiny.write_jsonl(path, rows)
        plan = make_plan(hashlib.sha256(path.read_bytes()).hexdigest(), len(rows), config)
        order = [plan.rows_at(step)[0].row for step in range(plan.steps)]
        first = next(place for place, row in enumerate(order) if row < 3)
        if first > 22 and set(order[first : first + 3]) == {0, 1, 2}:
            return path
    raise AssertionError


def test_a_spike_is_found_at_the_same_step_by_a_process_that_goes_on(run: Run, tmp_path: Path) -> None:
    """A file that leaves its range is taken back inside of it; stopped before, the next process finds the same."""
    set_guard(run, forgetting=0, anchor=0, spike=0.5)
    text = run.layout.config.read_text(encoding="utf-8")
    run.layout.config.write_text(text.replace("batch_size: 4", "batch_size: 1"), encoding="utf-8")
    file = leaving(tmp_path / "leaving.jsonl", read_config(run.layout.config))
    other = Run(shutil.copytree(run.layout.root, tmp_path / "other"))
    asked = Wishes()

    def stop_early(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step_in_file == 22:
            asked.ask("test")

    with pytest.raises(FileRejected):
        run.train(file)
    other.train(file, observe=stop_early, stop=asked)
    assert ("leaving.jsonl", "training") in states(other)
    with pytest.raises(FileRejected):
        other.train()
    notes = [[entry["note"] for entry in each.history() if entry["state"] == "quarantined"] for each in (run, other)]
    assert notes[0] == notes[1]
    assert "left its usual range at step" in notes[0][0]
    assert_same_state(run.layout.root, other.layout.root)
