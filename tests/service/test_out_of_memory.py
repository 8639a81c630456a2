"""Memory that runs out at any place of a file's journey: no file is lost to a machine that is short of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import onward
from daemons import SETTINGS, configure, rows_file
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.data.tokenized import Row
from onward.errors import DeviceLost
from onward.events import Event, Note
from onward.service.owner import faults
from onward.service.owner.training.steps import StepFailed, watched
from onward.store.ledger import PROOF, Ledger
from onward.training.accumulation import Accumulation
from onward.training.measuring.scores import Meter, Score
from onward.training.model import load, roundtrip
from onward.training.state import TrainState

ROWS = {"a.jsonl": 4, "b.jsonl": 3}
NAMES = tuple(ROWS)
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
FORMS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory."),
    lambda: RuntimeError(CUBLAS),
    MemoryError,
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."),
]
LOAD, FIRST_STEP, MIDDLE, COMMIT = "while loading", "at the first step", "in the middle of a file", "at a commit"
OPTIMIZER, READ_BACK = "in the optimizer's step", "while what was written is read back"
IN_ROWS = (FIRST_STEP, MIDDLE)
PLACES = (LOAD, FIRST_STEP, MIDDLE, COMMIT, OPTIMIZER, READ_BACK)


class Shortage:
    """Memory that runs out at one place of a process, a number of times.

    Args:
        error: makes what is raised.
        times: how often it is.
    """

    def __init__(self, error: Callable[[], Exception], times: int = 1) -> None:
        self.error = error
        self.left = times

    def strike(self) -> None:
        """Raise, unless it was raised often enough."""
        if self.left > 0:
            self.left -= 1
            raise self.error()

    def at(self, place: str, patch: pytest.MonkeyPatch) -> None:
        """Let memory run out there."""
        if place == LOAD:
            self._before(patch, load.AutoModelForCausalLM, "from_pretrained", lambda *_: True)
        elif place == OPTIMIZER:
            self._before(patch, torch.optim.AdamW, "step", lambda *_: True)
        elif place == READ_BACK:
            self._before(patch, roundtrip, "load_file", lambda *_: True)
        elif place == COMMIT:
            self._before(patch, TrainState, "snapshot", lambda state: state.step == 2)
        else:
            step = 0 if place == FIRST_STEP else 1
            self._before(patch, Accumulation, "gradients", lambda of, _: of.state.step == step)

    def before(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        """Let memory run out in calls of a function."""
        self._before(patch, owner, name, lambda *_: True)

    def _before(self, patch: pytest.MonkeyPatch, owner: Any, name: str, matches: Callable[..., bool]) -> None:
        plain = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if matches(*arguments):
                self.strike()
            return plain(*arguments, **options)

        patch.setattr(owner, name, call)


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run with two files in its queue, of 2 steps each."""
    made = Run.create(tmp_path / "run", str(model), later=True, **SETTINGS)
    for name, rows in ROWS.items():
        made.add(rows_file(tmp_path / name, rows))
    return made


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A run of the same files that never lacked memory."""
    folder = tmp_path_factory.mktemp("twin")
    made = new_run(folder / "run", model, **SETTINGS)
    made.train(*(rows_file(folder / name, rows) for name, rows in ROWS.items()))
    return made.layout.root


def watch(run: Run) -> list[str]:
    """Train all that waits as a daemon does; returns what it told."""
    told: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            told.append(event.message)

    assert 0 == run.watch(once=True, observe=observe)
    return told


@pytest.mark.parametrize("place", PLACES)
def test_no_file_is_lost_to_lack_of_memory(run: Run, twin: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Wherever memory runs out, and in whichever form, the files are trained as if it had not.

    What the rows of a step need is tried in smaller parts, also where rows may be so long that each would be a part of
    its own. For everything else the machine is waited for, and the state
    is the one of a run that never lacked memory.
    """
    form = FORMS[PLACES.index(place) % len(FORMS)]
    configure(run, max_length=8192 if place == MIDDLE else SETTINGS["max_length"])
    Shortage(form).at(place, monkeypatch)
    told = watch(run)
    assert {"done"} == {entry["state"] for entry in run.history()}
    blames_file = [note.startswith("a.jsonl failed and is tried again with each step in 2 parts") for note in told]
    assert (place in IN_ROWS) == sum(blames_file)
    if place not in IN_ROWS:
        assert 1 == sum("tried again in 1 s (failure 1 in a row)" in note for note in told)
        assert_same_state(twin, run.layout.root)


@pytest.mark.parametrize("form", [*FORMS, lambda: OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_what_is_said_of_a_lack_of_memory(
    run: Run, monkeypatch: pytest.MonkeyPatch, form: Callable[[], Exception]
) -> None:
    """A command that cannot load its model says what helps and how to go on with what waits; no file is named."""
    Shortage(form).at(LOAD, monkeypatch)
    outcome = onward("train", "--run", run.layout.root)
    assert (1, 1) == (outcome.status, outcome.err.count("onward: training cannot go on: "))
    assert "nvidia-smi, top), then: onward train\n" in outcome.err
    assert "Traceback" not in outcome.err
    assert not [name for name in NAMES if name in outcome.err]


def test_a_gpu_lost_while_loading_ends_the_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only another process can use the GPU again, so a daemon does not try: it ends with status 1, the files wait."""
    shortage = Shortage(lambda: RuntimeError("CUDA error: an illegal memory access was encountered"), times=9)
    shortage.at(LOAD, monkeypatch)
    with pytest.raises(DeviceLost, match="illegal memory access") as raised:
        run.watch(once=True)
    assert (8, 1) == (shortage.left, raised.value.exit_status)
    assert {"queued"} == {entry["state"] for entry in run.history()}


def test_a_gpu_lost_while_measuring_leaves_no_blank(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends, and the next one measures what is measured where nothing was lost."""
    settings = {**SETTINGS, "evaluation": {"share": 0.5}}
    run, twin = (Run.create(tmp_path / name, str(model), later=True, **settings) for name in ("run", "twin"))
    files = [rows_file(tmp_path / name, rows) for name, rows in zip(NAMES, (24, 26), strict=True)]
    twin.train(*files)
    run.add(*files)
    shortage, score = (
        Shortage(lambda: RuntimeError("CUDA error: an illegal memory access was encountered")),
        Meter.score,
    )

    def lost(meter: Meter, rows: Sequence[Row]) -> Score:
        shortage.strike()
        return score(meter, rows)

    monkeypatch.setattr(Meter, "score", lost)
    with pytest.raises(DeviceLost):
        run.watch(once=True)
    run.train()
    assert twin.grid() == run.grid()
    assert_same_state(twin.layout.root, run.layout.root)


@pytest.mark.parametrize("form", FORMS)
def test_moments_that_find_no_memory_are_not_damaged(
    run: Run, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Callable[[], Exception]
) -> None:
    """A daemon that cannot load a checkpoint's moments for lack of memory waits and goes on exactly from there."""
    assert 0 == onward("skip", NAMES[1], "--run", run.layout.root).status
    watch(run)
    run.add(tmp_path / NAMES[1])
    Shortage(form).before(monkeypatch, torch, "load")
    failures = [note for note in watch(run) if "failure" in note]
    assert [True] == [note.endswith("tried again in 1 s (failure 1 in a row)") for note in failures]
    assert_same_state(twin, run.layout.root)


@pytest.mark.parametrize("form", FORMS)
def test_a_proof_that_lacks_memory_is_no_failed_proof(
    run: Run, monkeypatch: pytest.MonkeyPatch, form: Callable[[], Exception]
) -> None:
    """`verify` ends with status 1 and says what helps; it does not say that the run does not verify, nor keep that."""
    watch(run)
    assert 0 == onward("verify", "--run", run.layout.root).status
    Shortage(form).before(monkeypatch, torch, "load")
    outcome = onward("verify", "--run", run.layout.root)
    assert (1, True) == (outcome.status, outcome.err.startswith("onward: memory ran out: "))
    assert "repeat the command" in outcome.err
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        assert (ledger.get(PROOF) or {})["ok"]


def test_what_helps_a_step_that_lacks_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` does not advise to leave the file out; the command that it names trains it in smaller parts."""
    Shortage(FORMS[0], times=2).at(FIRST_STEP, monkeypatch)
    outcome = onward("train", "--run", run.layout.root)
    assert (1, True) == (outcome.status, outcome.err.count("onward: memory ran out in a step of a.jsonl: ") == 1)
    assert ("onward watch --once" in outcome.err, "onward skip" in outcome.err) == (True, False)
    assert 0 == onward("watch", "--once", "--run", run.layout.root).status
    assert {"done"} == {entry["state"] for entry in run.history()}


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_who_is_blamed_for_lack_of_memory_in_a_step(form: Callable[[], Exception], crowded: bool) -> None:
    """The rows of the file, unless other processes hold a large part of the GPU: then it is waited for."""

    class Still:
        def expect_step(self, seconds: float) -> None: ...
        def moved(self) -> None: ...

    def steps() -> Any:
        raise form()
        yield

    with pytest.raises(StepFailed) as raised:
        next(watched(steps(), Still(), lambda: crowded))  # type: ignore[arg-type]
    assert (not crowded) is faults.blames_file(raised.value)
    assert faults.blames_file(StepFailed(IndexError("a row"), crowded=True))
