"""Random sequences of commands, interrupted at random, with others beside them that only look: the run ends as one that
only trained what is left, in order.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from faults import FULL_SIZE, Fault
from processes import as_it_is, command
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.config import stored_config
from onward.store.ledger import Ledger

SETTINGS: dict[str, Any] = {
    "batch_size": 2, "warmup_steps": 0, "lora": {"rank": 2}, "guard": {"action": "off"}, "settle_seconds": 0,
}  # fmt: skip
CHANGES: dict[str, list[Any]] = {
    "learning_rate": [1e-3, 2e-3],
    "batch_size": [1, 2, 3],
    "epochs": [1, 2],
    "boundary": ["carry", "reset_moments"],
    "gradient_accumulation": ["auto", 2],
    "lora": [{"rank": 2, "dropout": 0.0}, {"rank": 2, "dropout": 0.1}],
    "replay": [{"share": 0.0}, {"share": 0.3}],
    "save_steps": [1, 2, 1000],
    "keep_boundaries": [1, 5],
}
"""Keys that take effect at the next file, or at once, each with values to choose from."""
KINDS = ("SIGKILL", "SIGKILL", "SIGTERM", "ENOSPC", "EIO")
SEEDS = range(200 if FULL_SIZE else 3)
SEEDS_BESIDE = range(100 if FULL_SIZE else 1)


class Commands:
    """A run, and commands that are given to it.

    Args:
        seed: determines all that is chosen.
    """

    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self.run = new_run(folder / "run", model, **SETTINGS)
        self.files: dict[str, Path] = {}
        self.taken_out: set[str] = set()
        self.log: list[str] = []
        self._folder, self._seed, self._random = folder, seed, random.Random(seed)
        self.actions: list[Callable[[], object]] = [
            self.train, self.train, self.add, self.drop, self.change, self.change, self.damage, self.skip,
            self.rebuild, self.roll_back, self.reset,
        ]  # fmt: skip

    def act(self) -> None:
        """Do one thing."""
        self._random.choice(self.actions)()

    def call(self, *words: object, undisturbed: bool = False) -> int | None:
        """Run a command, which may be interrupted; return its exit status."""
        place = self._folder / f"command-{len(self.log)}"
        place.mkdir()
        prepare: Callable[[], None] = as_it_is
        if not undisturbed and self._random.random() < 0.5:
            at = self._random.choice([self._random.randint(1, 40), self._random.randint(1, 250)])
            prepare = Fault(at, self._random.choice(KINDS), place / "changes")
        status = command(place / "output", *words, "--run", self.run.layout.root, prepare=prepare)
        printed = (place / "output").read_text()
        self.log.append(f"{' '.join(map(str, words))}  {prepare}: {status}\n{printed}")
        assert "Traceback" not in printed
        return status

    def until_done(self, *words: object) -> bool:
        """Run a command, and once more if it was interrupted; return whether it was done."""
        return self.call(*words) == 0 or self.call(*words, undisturbed=True) == 0

    def states(self, *states: str) -> list[str]:
        """Return the names of the files in these states, in order."""
        with Ledger(self.run.layout.ledger, read_only=True) as ledger:
            return [row.name for row in ledger.files(*states)]

    def new_file(self) -> Path:
        """Return a file of a few rows that no other has."""
        number = len(self.files)
        rows = tiny.chat_rows(self._random.randint(1, 7), seed=1000 * self._seed + number)
        path = self.files[f"{number}.jsonl"] = tiny.write_jsonl(self._folder / f"{number}.jsonl", rows)
        return path

    def train(self) -> None:
        """Train what waits and up to two files more."""
        self.call("train", *(self.new_file() for _ in range(self._random.randint(0, 2))))

    def add(self) -> None:
        """Add a file or two."""
        self.call("add", *(self.new_file() for _ in range(self._random.randint(1, 2))))

    def drop(self) -> None:
        """Put a file into the inbox, and watch."""
        shutil.copy(self.new_file(), self.run.layout.inbox)
        self.call("watch", "--once")

    def change(self) -> None:
        """Change a key of the config."""
        key = self._random.choice(sorted(CHANGES))
        set_keys(self.run, **{key: self._random.choice(CHANGES[key])})
        self.log.append(f"changed {key}")

    def damage(self) -> None:
        """Change a byte of the newest state, which its links share; an older state remains."""
        files = [path for path in sorted(self.run.layout.current.rglob("*")) if path.is_file() and path.stat().st_size]
        if len(self.run.layout.restore_points()) > 1 and files:
            path = self._random.choice(files)
            content = bytearray(path.read_bytes())
            content[self._random.randrange(len(content))] ^= 1
            path.write_bytes(content)
            self.log.append(f"damaged {path}")
            self.call("train")

    def skip(self) -> None:
        """Take out a file that waits or is in hand."""
        waiting = self.states("queued", "training")
        if waiting:
            name = self._random.choice(waiting)
            self.until_done("skip", name)
            self.taken_out |= {name} & {*self.states("skipped")}

    def rebuild(self) -> None:
        """Take out a finished file."""
        done = self.states("done")
        if done:
            name = self._random.choice(done)
            if self.call("rebuild", "--without", name, "--yes") != 0 and name in self.states("done"):
                self.call("rebuild", "--without", name, "--yes", undisturbed=True)
            assert name not in self.states("done")
            self.taken_out.add(name)

    def roll_back(self) -> None:
        """Go back to one of the last boundaries, with or without queueing the later files again."""
        done, again = self.states("done"), self._random.random() < 0.5
        if len(done) > 1:
            to = self._random.choice(done[-4:-1])
            later = {*self.states("done", "training")} - {*done[: done.index(to) + 1]}
            if self.until_done("rollback", "--to", f"file:{done.index(to) + 1}", "--yes", *["--requeue"] * again):
                self.taken_out |= set() if again else later

    def reset(self) -> None:
        """Forget all progress, in one of four cases."""
        begun = {*self.states("done", "training")}
        if begun and self._random.random() < 0.25 and self.until_done("reset", "--yes"):
            self.taken_out |= begun

    def finish(self) -> None:
        """Train all that was given and not taken out, undisturbed."""
        self.call("train", undisturbed=True)
        known = {*self.taken_out, *self.states("done", "queued", "training", "arriving")}
        missing = [path for name, path in self.files.items() if name not in known]
        assert 0 == self.call("train", *missing, undisturbed=True)


LOOKS: tuple[tuple[str, ...], ...] = (
    ("status", "--json"), ("history", "--json"), ("grid", "--json"), ("metrics",), ("releases", "--json"),
    ("doctor", "--json"), ("evaluate", "--json"), ("preview", "FILE"), ("plot", "NEW.svg"), ("release", "NEW"),
    ("export", "NEW"), ("export", "NEW", "--format", "merged"),
)  # fmt: skip
"""Commands that take nothing from a run and may be given at any time; FILE is a training file, NEW is new each time."""


class Looking(threading.Thread):
    """Somebody who looks at a run again and again, in a random order, until told to end.

    Args:
        file: a training file.
    """

    def __init__(self, run: Run, folder: Path, file: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.log: list[tuple[str, int | None, str]] = []
        self.end = threading.Event()
        self._run, self._folder, self._file, self._random = run, folder, file, random.Random(seed)
        folder.mkdir()

    def run(self) -> None:
        """Look."""
        while not self.end.is_set():
            new = f"v{len(self.log)}"
            named = {"FILE": str(self._file), "NEW.svg": str(self._folder / f"{new}.svg")}
            words = self._random.choice(LOOKS)
            named["NEW"] = new if words[0] == "release" else str(self._folder / new)
            output = self._folder / f"{new}.txt"
            status = command(output, *(named.get(word, word) for word in words), "--run", self._run.layout.root)
            self.log.append((" ".join(words), status, output.read_text()))


def set_keys(run: Run, **values: Any) -> None:
    """Change the config on disk."""
    config = yaml.safe_load(run.layout.config.read_text())
    run.layout.config.write_text(yaml.safe_dump({**config, **values}))


def trained_alike(commands: Commands, model: Path, folder: Path) -> Run:
    """Return a run that has trained the same files in the same order, each under the config that it had."""
    twin = new_run(folder, model, **SETTINGS)
    with Ledger(commands.run.layout.ledger, read_only=True) as ledger:
        rows = ledger.files("done")
        configs = [stored_config(ledger.config_of(row)).recorded() for row in rows]
    for row, config in zip(rows, configs, strict=True):
        set_keys(twin, **{key: config[key] for key in CHANGES})
        twin.train(commands.files[row.name])
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_left_is_trained_as_if_nothing_else_had_been(seed: int, model: Path, tmp_path: Path) -> None:
    """Every file that was given and not taken out is trained once, and the run proves itself."""
    commands = Commands(tmp_path, model, seed)
    try:
        for _ in range(12):
            commands.act()
        require_exact(commands, model, tmp_path / "twin")
    except BaseException as error:
        error.add_note("\n".join(commands.log))
        raise


def require_exact(commands: Commands, model: Path, folder: Path) -> None:
    """Train what is left, and compare the run with its twin."""
    commands.finish()
    assert {*commands.files} - commands.taken_out == {*commands.states("done")}
    if commands.files.keys() > commands.taken_out:
        assert_same_state(trained_alike(commands, model, folder).layout.root, commands.run.layout.root)
        assert commands.run.verify(deep=True).ok


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS_BESIDE)
def test_who_only_looks_is_answered_whatever_is_done_to_the_run(seed: int, model: Path, tmp_path: Path) -> None:
    """They get an answer or are told what there is instead, and change nothing; `doctor` may find what was torn."""
    commands = Commands(tmp_path, model, seed)
    commands.actions.remove(commands.damage)
    looking = Looking(commands.run, tmp_path / "looking", commands.new_file(), seed)
    try:
        looking.start()
        for _ in range(8):
            commands.act()
        looking.end.set()
        looking.join()
        require_exact(commands, model, tmp_path / "twin")
        allowed = {"doctor --json": {0, 1}}
        wrong = [each for each in looking.log if "Traceback" in each[2] or each[1] not in allowed.get(each[0], {0, 2})]
        assert [] == wrong
    except BaseException as error:
        error.add_note("\n".join([*commands.log, *map(str, looking.log)]))
        raise
