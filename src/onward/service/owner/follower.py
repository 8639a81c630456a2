"""A rank that follows: it takes the steps that rank 0 announces, and owns nothing.

It opens the run's config, base model and tokens only for reading. Lock, ledger, inbox, commits, measurements and all
output are rank 0's.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from onward.config import Config, stored_config
from onward.data.plan.loader import Batch, batch_at
from onward.data.plan.replay import StreamPlan
from onward.data.tokenized import Row, TokenizedFile
from onward.errors import DamagedState, ModelError, RankLost
from onward.layout import RunLayout
from onward.ranks import LOST, Place
from onward.service.wishes import Wishes
from onward.training.checkpoints.checkpoint import Manifest
from onward.training.device.environment import release_freed_memory
from onward.training.device.errors import forget_frames
from onward.training.device.execution import Execution, Placement
from onward.training.model.adapter import adapter_told, set_dropout
from onward.training.model.base import base_of_run, digest_base
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.model.treatment import Treatment
from onward.training.ranks.failures import Released
from onward.training.ranks.forming import form
from onward.training.ranks.group import Group
from onward.training.ranks.orders import COMMIT, END, FILE, LOAD, MEASURE, RELEASE, STEP, plan_told
from onward.training.ranks.sameness import hold_same
from onward.training.ranks.watch import Watch
from onward.training.state import Snapshot, TrainState
from onward.training.steps.anchor import AnchorTerm
from onward.training.steps.economy import Learned
from onward.training.trainer import Trainer
from onward.training.world import Message

if TYPE_CHECKING:
    from onward.training.sharding.held import Held

VISIBLE = 60.0
"""Seconds within which a folder that another machine made must be visible here: NFS caches directories for a while."""


def join(place: Place, patience: float, stop: Wishes) -> Group:
    """Form the group with the other ranks.

    Args:
        patience: seconds after which a rank that shows no sign of life is lost.
        stop: a stop asked for here ends the wait for others.

    Raises:
        RankLost: a rank did not join.
        Stopped: a stop was asked for before all had joined.
    """
    return form(place, patience, lambda _: None, stop.check_for_end)


def follow(layout: RunLayout, group: Group, stop: Wishes, report: Callable[[str], None] = lambda _: None) -> None:
    """Follow rank 0 until it ends.

    Args:
        stop: a stop asked for here is passed on to rank 0.
        report: receives a line if rank 0 can no longer say why it ends.

    Raises:
        RankLost: another rank is gone.
    """
    group.watch.asked = lambda: stop.reason if stop.wants_end else None
    group.watch.on_loss = partial(_end_process, group.watch, report)
    try:
        with _explained(group.watch, report):
            Follower(layout, group).follow()
    except Released:
        group.is_broken = True
    finally:
        group.end()


@contextlib.contextmanager
def _explained(watch: Watch, report: Callable[[str], None]) -> Generator[None]:
    """Raise the loss of a rank in the words of the rank that knows why, unless rank 0 has ended and that was all."""
    try:
        yield
    except RankLost as error:
        explained = watch.explain(error)
        _say_loss(watch, report, explained)
        raise explained from None


def _say_loss(watch: Watch, report: Callable[[str], None], error: RankLost) -> None:
    if watch.misses_first and watch.is_first_to_say():
        report(f"onward: {error}")


def _end_process(watch: Watch, report: Callable[[str], None], error: RankLost) -> NoReturn:
    _say_loss(watch, report, error)
    os._exit(LOST)


class Follower:
    """One rank's part of a run, directed by rank 0.

    Args:
        layout: the run's directory, as this rank sees it.
    """

    def __init__(self, layout: RunLayout, group: Group) -> None:
        self._layout, self._group = layout, group
        self._state: TrainState | None = None
        self._model: str | None = None
        """What the state's model was built from."""
        self._trainer: Trainer | None = None
        self._plan: StreamPlan | None = None
        self._files: Mapping[str, TokenizedFile] = {}
        self._failure: Exception | None = None
        self._learned = Learned()
        self._held: Held | None = None
        self._placement: Placement | None = None
        self._writing: threading.Thread | None = None
        self._copy: Snapshot | None = None
        self._digests: dict[Path, str] = {}

    def follow(self) -> None:
        """Do what rank 0 asks for until it ends.

        Raises:
            RankLost: another rank is gone.
            Released: rank 0 ended in the middle of a task.
        """
        actions = {
            FILE: self._begin, STEP: self._step, RELEASE: lambda _: self._let_go(),
            LOAD: self._load, MEASURE: self._measure, COMMIT: lambda _: self._commit(),
        }  # fmt: skip
        while (order := self._group.listen())["order"] != END:
            try:
                actions[order["order"]](order)
            except RankLost:
                raise
            except Exception as error:  # rank 0 was told, or will be before the next step
                self._failure = error
                self._trainer = None
                forget_frames(error)

    def _begin(self, order: Message) -> None:
        """Prepare for the steps of a file."""
        self._failure = self._trainer = None
        config = stored_config(order["config"])
        anchor = _anchor_memory(order["anchor"])
        followed = self._state is not None and self._state.step == order["state"]["counters"]["step"]
        placement = self._placement
        if placement is None or placement.holds_whole:
            hold_same(lambda: self._ready(order, config), self._group, anchor, followed=followed)
        else:
            with self._group.together():
                self._ready(order, config)
        assert self._state is not None
        dtype = getattr(torch, order["dtype"])
        execution = Execution(self._group, dtype, order["pad_id"], order["by_length"], placement=placement)
        self._trainer = Trainer(self._state, config, execution, anchor, learned=self._learned)

    def _ready(self, order: Message, config: Config) -> TrainState:
        """Open the file's tokens and return a state of the same model as rank 0's, apart from its values."""
        origin = {key: order[key] for key in ("model", "adapter", "dtype")}
        origin["adapter"] = {**(origin["adapter"] or {}), "lora_dropout": None}
        model = json.dumps([config.identity(), origin], sort_keys=True)
        if self._held is None and (self._state is None or model != self._model):
            self._let_go()
            self._state, self._model = self._built(order, config), model
        self._plan = plan_told(order["plan"])
        self._files = {sha256: _tokens(self._layout.tokens / name) for sha256, name in order["tokens"].items()}
        assert self._state is not None
        state, plain = self._state, order["state"]
        state.method.configure(state.optimizer, config)
        set_dropout(state.model, config.lora.dropout)
        if plain["counters"]["adam_origin"] == plain["counters"]["step"]:
            state.reset_moments()
        state.load_plain(plain)
        return state

    def _built(self, order: Message, config: Config) -> TrainState:
        spec, treatment = self._spec(order, config)
        model = build_model(spec, treatment=treatment, adapter=adapter_told(order["adapter"]))
        return TrainState.start(model, config)

    def _load(self, order: Message) -> None:
        """Build this rank's part of a sharded model; what that needs is imported only then."""
        from onward.training.sharding.files import host_mesh
        from onward.training.sharding.held import hold

        self._let_go()
        config, folder = stored_config(order["config"]), order["folder"]
        manifest = None if order["manifest"] is None else Manifest.model_validate(order["manifest"])
        self._group.wait_unseen()
        host = host_mesh()
        with self._group.together():
            spec, treatment = self._spec(order, config)
            self._held = hold(spec, host, folder and self._layout.root / folder, manifest, treatment)
            self._state = self._held.state
        self._placement = self._held.placement(order["pad_id"], by_length=order["by_length"])

    def _measure(self, order: Message) -> None:
        assert self._held is not None
        probed = self._held.probe(order["seed"])
        if order["whole"]:
            self._held.measure(probed)

    def _commit(self) -> None:
        """Copy this rank's shards, and write them behind training; a failure also fails at rank 0, which reports it."""
        held = self._held
        assert held is not None
        assert held.shards is not None
        self._wait_for_shards()
        copy = self._copy = held.state.snapshot(into=self._copy)
        target = self._layout.shards / "state"

        def write() -> None:
            with contextlib.suppress(Exception):
                held.write(target, copy)

        self._writing = threading.Thread(target=write, name="onward-shards", daemon=True)
        self._writing.start()

    def _wait_for_shards(self) -> None:
        if self._writing is not None:
            self._writing.join()
        self._writing = None

    def _spec(self, order: Message, config: Config) -> tuple[ModelSpec, Treatment | None]:
        """Return what a model is built from, according to rank 0 and with the base model on this machine."""
        base, told = base_of_run(self._layout.root, config.model), order["model"]
        if base not in self._digests:
            self._digests[base] = digest_base(base)
        if told["base"] != self._digests[base]:
            raise ModelError(
                "the base model here is not that of rank 0",
                where=base,
                hint="Every machine needs the same files of the base model.",
            )
        spec = ModelSpec(config, base, self._group.device, getattr(torch, order["dtype"]))
        found = told["treatment"]
        return spec, None if found is None else Treatment.of(found)

    def _step(self, order: Message) -> None:
        """Take the next step; a failure here since the last one now fails on every rank."""
        batch = self._next_batch()
        if self._trainer is None or self._plan is None or batch is None:
            with self._group.together():
                raise self._failure or RuntimeError("no file has begun here")
        self._trainer.economy.setting = order["recomputation"]
        self._trainer.take_step(batch, self._plan)

    def _next_batch(self) -> Batch | None:
        if self._trainer is None or self._plan is None:
            return None
        try:
            return batch_at(self._files, self._plan, self._trainer.state.cursor.step)
        except Exception as error:
            self._failure = error
            return None

    def _let_go(self) -> None:
        self._wait_for_shards()
        self._state = self._trainer = self._plan = self._model = self._held = self._placement = self._copy = None
        self._files, self._learned = {}, Learned()
        gc.collect()
        release_freed_memory()


def _tokens(folder: Path) -> TokenizedFile:
    ends = time.monotonic() + VISIBLE
    while True:
        try:
            return TokenizedFile.open(folder)
        except DamagedState:
            if folder.is_dir() or time.monotonic() > ends:
                raise
        time.sleep(0.1)


def _anchor_memory(told: dict[str, Any] | None) -> AnchorTerm | None:
    """Allocate memory for the anchor's tensors, which rank 0 sends."""
    if told is None:
        return None
    texts, targets, top = told["shape"]
    rows = [Row(np.zeros(targets + 1, dtype=np.int64), np.arange(targets + 1) > 0) for _ in range(texts)]
    shape = (texts, targets, top)
    return AnchorTerm(rows, torch.empty(shape, dtype=torch.int64), torch.empty(shape), told["weight"])
