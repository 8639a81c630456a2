"""Estimates what training a file will take on this machine, by measuring a few of its steps on a copy of the state.

The copy is in the memory of this process and in a scratch directory, which is removed at its end. The first step taken
is the heaviest one of the file, so that the memory is that of the worst case; its time counts too, once it was repeated
without the cost of a first step.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onward.config import Config
from onward.config.text import read_config
from onward.data.plan.loader import batch_at
from onward.data.plan.order import make_plan
from onward.data.plan.replay import StreamPlan
from onward.data.row_tokenizer import Fitted
from onward.data.tokenize import check_rows
from onward.data.tokenized import Row, TokenizedFile, TokenizedWriter
from onward.digest import sha256_file
from onward.errors import OnwardError
from onward.layout import RunLayout
from onward.library.making import open_ledger
from onward.service.intake.names import plain_name
from onward.service.intake.refusals import Refusal
from onward.service.intake.rules import RulesOfRun
from onward.service.knowledge.plans import OpenSources, plan_at
from onward.service.owner.training.part_tokens import with_part_tokens
from onward.service.owner.training.start import load_start
from onward.service.session import Session, open_session
from onward.service.state.reading import snapshot
from onward.service.state.settle import Settled
from onward.store.ledger import Ledger
from onward.training.boundary import cross_boundary
from onward.training.checkpoints.checkpoint import estimate_size
from onward.training.device.errors import is_out_of_memory
from onward.training.device.memory import read_total
from onward.training.state import TrainState
from onward.training.steps.anchor import TOP, AnchorTerm
from onward.training.steps.economy import Learned
from onward.training.trainer import Trainer
from onward.views.opened import opened, rejection

TIMED = 4
"""The most steps that are timed."""
ENOUGH_SECONDS = 60.0
"""Seconds of timed steps after which no further step is taken."""
LOOKED_AT = 20_000
"""How many steps are searched for the heaviest."""


@dataclass(frozen=True)
class Estimate:
    """What training a file will take.

    Args:
        name: the file's name.
        steps: optimizer steps, over all epochs.
        tokens: tokens in them, with those of replayed rows; of a very long file, as its first steps suggest.
        seconds: wall time of the steps; commits run behind them.
        timed_steps: steps that were measured, including the heaviest.
        tokens_per_second: the pace of the timed steps.
        memory_bytes: memory at the peak: of the GPU, or of the whole process on a CPU, with the copy that a commit
            takes.
        memory_total_bytes: the memory of the GPU or the machine.
        heaviest_tokens: tokens of the heaviest step.
        device: the device on which it was measured.
        cost: the cost at the given price per hour; None without one.
    """

    name: str
    steps: int
    tokens: int
    seconds: float
    timed_steps: int
    tokens_per_second: float
    memory_bytes: int
    memory_total_bytes: int | None
    heaviest_tokens: int
    device: str
    cost: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def estimate(layout: RunLayout, path: Path, price_per_hour: float | None = None) -> Estimate:
    """Take a few steps of a file on a copy of the run's newest state; the run is not changed.

    Args:
        path: a training file, or any other source that `add` takes; it need not be in the stream.
        price_per_hour: what an hour of this machine costs, in any currency.

    Raises:
        FileRejected: `add` would refuse the file.
        UsageError: there is no run, or no such file.
        OnwardError: the heaviest step does not fit into memory.
    """
    layout.require()
    with (
        opened(path) as file,
        open_ledger(layout) as ledger,
        tempfile.TemporaryDirectory(prefix="onward-estimate-") as scratch,
    ):
        config = read_config(layout.config)
        tokens = _tokenize(layout, ledger, file, config, Path(scratch) / "tokens")
        own = make_plan(sha256_file(file), tokens.rows, config)
        plan = plan_at(ledger, own, config, ledger.last_position() + 1)
        session = open_session(layout, ledger, report=lambda _: None)
        files = OpenSources(session, lambda: None).of_plan(plan, tokens)
        state = _copy_of_state(layout, session, Path(scratch) / "state")
        measured = _Measured(session, state, config, files, plan)
        try:
            measured.measure()
        except Exception as error:
            if is_out_of_memory(error):
                raise _does_not_fit(path, session.device) from None
            raise
        memory, total = _peak(session.device), read_total(session.device)
        memory += estimate_size(state.view(), session.facts())
    return _result(file.name, plan, measured, (memory, total), price_per_hour)


class _Measured:
    """Steps of a file taken on a copy, in any order, and how long they took."""

    def __init__(
        self, session: Session, state: TrainState, config: Config, files: Mapping[str, TokenizedFile], plan: StreamPlan
    ) -> None:
        position = state.cursor.position + (1 if state.cursor.at_boundary else 0)
        state.cursor = replace(state.cursor, step=0, steps=0)
        learned = Learned()
        config = with_part_tokens(session, state, config, learned, keep=False)
        cross_boundary(state, config, plan, position)
        self.state = state
        self.files = files
        self.plan = plan
        anchor = _stand_in(config, session.capacity.embedding_rows or 1)
        self.trainer = Trainer(state, config, session.execution, anchor, learned=learned)
        self.device = session.device
        self.weights = self._tokens_of_steps()
        self.seconds, self.tokens, self.steps = 0.0, 0, 0

    def measure(self) -> None:
        """Take the heaviest step twice, then others far apart, until there are enough."""
        heaviest = max(range(len(self.weights)), key=self.weights.__getitem__)
        self._take(heaviest)
        count = min(TIMED, self.plan.steps)
        others = [self.plan.steps * part // count for part in range(count)]
        for step in dict.fromkeys([heaviest, *others]):
            self._time(step)
            if self.steps == TIMED or self.seconds > ENOUGH_SECONDS:
                return

    def _time(self, step: int) -> None:
        begun = time.perf_counter()
        self.tokens += self._take(step)
        self.seconds += time.perf_counter() - begun
        self.steps += 1

    def _take(self, step: int) -> int:
        self.state.cursor = replace(self.state.cursor, step=step)
        tokens = self.trainer.take_step(batch_at(self.files, self.plan, step), self.plan).tokens
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return tokens

    def _tokens_of_steps(self) -> list[int]:
        lengths = {sha256: tokens.lengths() for sha256, tokens in self.files.items()}
        steps = range(min(self.plan.steps, LOOKED_AT))
        return [sum(int(lengths[row.sha256][row.row]) for row in self.plan.rows_at(step)) for step in steps]


def _stand_in(config: Config, tokens: int) -> AnchorTerm | None:
    """Return a term that takes what the anchor's does, on texts of its shape: the run's may not be written yet."""
    anchor = config.anchor
    if not (anchor.weight and anchor.rows):
        return None
    text = Row(np.arange(anchor.tokens) % tokens, np.arange(anchor.tokens) > 0)
    shape = (anchor.rows, anchor.tokens - 1, TOP)
    return AnchorTerm([text] * anchor.rows, torch.zeros(shape, dtype=torch.long), torch.zeros(shape), anchor.weight)


def _tokenize(layout: RunLayout, ledger: Ledger, path: Path, config: Config, target: Path) -> TokenizedFile:
    rules = RulesOfRun(layout, ledger, lambda: config)()
    writer = TokenizedWriter(target)

    def seen(line: int, fitted: Fitted) -> None:
        if fitted.packed is not None:
            writer.append([fitted.packed], [line])

    try:
        report = check_rows(path, rules.tokenizer, seen, reading=rules.reading)
        if not report.ok:
            raise rejection(Refusal.of_rows(plain_name(path.name), report))
        writer.publish({})
    finally:
        writer.discard()
    return TokenizedFile.open(target, verify=False)


def _copy_of_state(layout: RunLayout, session: Session, target: Path) -> TrainState:
    """Return the newest committed state, or that of step 0, in memory; a daemon may continue meanwhile."""
    if session.ledger.newest_checkpoint() is None:
        return load_start(session, Settled(None, None), proves_again=False).state
    manifest = snapshot(layout, target)
    return load_start(session, Settled(target, manifest), proves_again=False).state


def _peak(device: torch.device) -> int:
    """Return the bytes that this process, or its part of the GPU, took at its peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _does_not_fit(path: Path, device: torch.device) -> OnwardError:
    where = "the GPU" if device.type == "cuda" else "this machine"
    hint = "In onward.yaml, gradient_accumulation divides a step into smaller parts, and max_length makes rows shorter."
    return OnwardError(f"the heaviest step does not fit into the memory of {where}", where=path, hint=hint)


def _result(
    name: str, plan: StreamPlan, measured: _Measured, memory: tuple[int, int | None], price_per_hour: float | None
) -> Estimate:
    tokens = round(sum(measured.weights) * plan.steps / len(measured.weights))
    pace = measured.tokens / measured.seconds
    seconds = tokens / pace
    device = measured.device
    return Estimate(
        name=name,
        steps=plan.steps,
        tokens=tokens,
        seconds=seconds,
        timed_steps=measured.steps,
        tokens_per_second=pace,
        memory_bytes=memory[0],
        memory_total_bytes=memory[1],
        heaviest_tokens=max(measured.weights),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        cost=None if price_per_hour is None else seconds / 3600 * price_per_hour,
    )
