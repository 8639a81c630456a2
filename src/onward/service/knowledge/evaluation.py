"""Measures a run: which files, which texts, against which base; at a boundary within its share, or everything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from onward.config import RESIDUAL_INITS, Config, stored_config
from onward.data.plan.holdout import rows_in_question
from onward.data.tokenized import Row, TokenizedFile
from onward.errors import ConfigError, DamagedState
from onward.hooks.answers import LOOKS, judged
from onward.hooks.evaluation import Anchor, Measuring, Sample, Subject, allowance, in_rotation
from onward.service.knowledge.account import Account, Measured
from onward.service.knowledge.anchor import anchor_rows, anchor_term
from onward.service.knowledge.samples import Samples
from onward.service.knowledge.table import BEFORE, GRID
from onward.service.session import Session
from onward.service.state.own_parts import start_folder
from onward.store.ledger import Ledger
from onward.store.rows import FileRow
from onward.training.boundary import Boundary
from onward.training.measuring.scores import Compute, Meter
from onward.training.model.capacity import anchor_excess
from onward.training.model.load import build_model
from onward.training.seeds import fold
from onward.training.steps.anchor import AnchorTerm

KNOWN_FILES = 3
"""How many of the newest earlier files are tried to see whether the model can tell their answers apart."""


@dataclass(frozen=True)
class _Now:
    """The measurement being made: at which file, under which config, within which allowance."""

    row: FileRow
    position: int
    config: Config
    step: int
    measuring: Measuring


@dataclass(frozen=True)
class _Others:
    """What else may be measured besides the current file, looked up one by one: there may be thousands."""

    keys: Sequence[str]
    subject: Callable[[str], Subject]


class Evaluation:
    """Measures models of one run: the one in training, a restore point, a branch.

    Args:
        look: called between two forward passes and while rows are read again; may raise to give up.
        samples: the folder for the rows that files are measured on; by default in the run's cache, for its owner only.
    """

    def __init__(self, session: Session, look: Callable[[], None] = lambda: None, samples: Path | None = None) -> None:
        self._session = session
        self._ledger = session.ledger
        self._look = look
        self._samples = Samples(session, look, samples or session.layout.samples)
        self.account = Account(self._ledger)
        self._meter: tuple[nn.Module, Meter] | None = None
        self.writers: frozenset[type[nn.Module]] | None = None
        """Types of modules that write to weights in evaluation mode, if that was found out before."""

    @property
    def is_possible(self) -> bool:
        """Whether this process can run the model by itself."""
        return not self._session.in_shards

    @property
    def anchor_at_start(self) -> Measured | None:
        """The KL divergence from the base before the first file: zero, or None if the run began from another state."""
        config = self._session.config
        is_base = not config.adapter or not adapter_off_is_base(config)
        return Measured(0, 0.0) if is_base and not self._ledger.get("origin_step", 0) else None

    def at_boundary(self, boundary: Boundary) -> dict[str, Any]:
        """Measure at a boundary; an `AtBoundary` hook."""
        row = self._ledger.at_position(boundary.position)
        if row is None or not boundary.config.evaluation.share:
            return {}
        return self.of_boundary(boundary.model, row, boundary.config, boundary.step, boundary.tokens)

    def of_boundary(
        self, model: nn.Module, row: FileRow, config: Config, step: int, tokens: TokenizedFile | None = None
    ) -> dict[str, Any]:
        """Measure at the boundary after a file: the file, the anchor, the base, others in rotation."""
        left = self._allowance(model, config, row.place, begun=True)
        now = self._begin(model, row, config, (row.place, step), left)
        own, measuring = self._subject(now, row, tokens), now.measuring
        if measuring.of_model(own):
            self._measure_anchor(now)
            if measuring.of_base(own):
                others = self._others(now)
                measuring.all_of_model(map(others.subject, in_rotation(others.keys, config.seed, step)))
                self._measure_missing_base(now, others)
        return {GRID: measuring.result()}

    def before(
        self, model: nn.Module, row: FileRow, config: Config, tokens: TokenizedFile, place: tuple[int, int]
    ) -> dict[str, Any]:
        """Measure a file before its first step: how much other files taught about it.

        Args:
            place: the position that the file is about to get, and the run's step.
        """
        if not config.evaluation.share or place[0] < 2:  # before the first file, the model is the base
            return {}
        now = self._begin(model, row, config, place, self._allowance(model, config, place[0], begun=False))
        now.measuring.of_model(self._subject(now, row, tokens))
        return {BEFORE: now.measuring.result()} if now.measuring.cost else {}

    def everything(self, model: nn.Module, row: FileRow, config: Config, step: int) -> dict[str, Any]:
        """Measure a model on all files of the stream up to one, on the anchor and on `evaluation.files`.

        Nothing is recorded. The model may be one that was trained on a branch, or a restore point's.

        Args:
            row: the last file of the stream to measure.

        Raises:
            ConfigError: a file of `evaluation.files` cannot be read.
        """
        self.require_questions(config)
        now = self._begin(model, row, config, (row.place, step), None)
        others = self._others(now)
        now.measuring.all_of_model([*map(others.subject, others.keys), self._subject(now, row, None)])
        self._measure_anchor(now)
        return now.measuring.result()

    def anchor_term(self, model: nn.Module, config: Config) -> AnchorTerm | None:
        """Return the anchor's term in the loss of a step under a config; None if it has no weight.

        Args:
            model: the model in training.
        """
        return anchor_term(self._session, config, lambda: self._base(self._meter_of(model, config), config))

    def row_losses(self, model: nn.Module, rows: Sequence[Row]) -> list[float]:
        """Return the mean loss over the target tokens of each single row; nothing is recorded."""
        meter = self._meter_of(model, self._session.config)
        return [meter.score([row]).loss for row in rows]

    def answers(self, model: nn.Module, row: FileRow, tokens: TokenizedFile) -> dict[str, Any]:
        """Judge, before its first step, whether a file's answers say anything and belong to their questions."""
        order = rows_in_question(self._session.config.seed, row.sha256, tokens.rows, LOOKS[-1])
        rows, longest = [tokens.row(place) for place in order], self._session.capacity.learned_positions
        found = judged(rows, partial(self.row_losses, model), self._known(row), longest)
        return found | {"lines": [tokens.line(order[place]) for place in found.pop("worst")]}

    def _known(self, row: FileRow) -> Iterator[Sequence[Row]]:
        """Yield a few rows of each of the newest files before one, each content once, as far as they can be read."""
        seen = {row.sha256}
        for place in range(self._ledger.last_begun(), 0, -1):
            other = self._ledger.at_position(place)
            if other is None or other.sha256 in seen:
                continue
            if len(seen) > KNOWN_FILES:
                return
            seen.add(other.sha256)
            with contextlib.suppress(DamagedState, ConfigError):
                yield self._samples.of_any_rows(other, stored_config(self._ledger.config_of(other)), LOOKS[0])

    def require_questions(self, config: Config) -> None:
        """Refuse `evaluation.files` that cannot be read, before a file is begun under this config.

        Raises:
            ConfigError: a file cannot be read; the hint says what to do.
        """
        for name in config.evaluation.files:
            self._samples.of_question_file(name, config)

    def asked(self, config: Config) -> dict[str, str]:
        """Return the names of the `evaluation.files` that can be read now, by content."""
        found: dict[str, str] = {}
        for name in config.evaluation.files:
            with contextlib.suppress(ConfigError):
                found[self._samples.of_question_file(name, config)[0]] = name
        return found

    def _begin(self, model: nn.Module, row: FileRow, config: Config, place: tuple[int, int], left: int | None) -> _Now:
        meter = self._meter_of(model, config)
        measuring = Measuring(meter, partial(self._base, meter, config), left)
        return _Now(row, place[0], config, place[1], measuring)

    def _allowance(self, model: nn.Module, config: Config, position: int, *, begun: bool) -> int:
        before = self.account.up_to(position - 1)
        trained, spent = before.tokens, before.cost
        row = self._ledger.at_position(position) if begun else None
        if row is not None:
            trained += self._ledger.tokens_of(row.id)
            spent += self._ledger.boundary_results(row.id).get(BEFORE, {}).get("cost", 0)
        return allowance(config, trained, spent, self._meter_of(model, config).parameters)

    def _meter_of(self, model: nn.Module, config: Config) -> Meter:
        """Return the meter of a model under a config, reused if it is the same model."""
        compute = self._compute(config)
        if self._meter is None or self._meter[0] is not model:
            self._meter = (model, Meter(model, compute, self.writers))
        return self._meter[1].under(compute)

    def _compute(self, config: Config) -> Compute:
        return Compute(config, self._session.execution, self._look)

    def _base(self, meter: Meter, config: Config) -> Meter:
        """Return the meter of the base: the model with its adapter off, or the base loaded in addition."""
        if adapter_off_is_base(config):
            return meter.without_adapter()
        session = self._session
        start = start_folder(session.layout, session.ledger, session.config)
        model = build_model(replace(session.spec, config=config), checkpoint=start, treatment=session.treatment)
        return Meter(model.requires_grad_(False), self._compute(config), self.writers)

    def _measure_anchor(self, now: _Now) -> None:
        anchor = now.config.anchor
        if not anchor.rows or not now.measuring.texts_that_fit(anchor.rows, anchor.tokens):
            return  # then they need not be written yet either
        if why := anchor_excess(self._session.capacity, now.config):
            self._ledger.add_event("warning", f"the anchor was not measured here: {why}", now.step)
            return
        texts = anchor_rows(self._session, now.config, now.measuring.base)
        now.measuring.divergence(Anchor(texts, fold(now.config.seed, "anchor", now.step) % len(texts)))

    def _measure_missing_base(self, now: _Now, others: _Others) -> None:
        """Measure the base on files that were measured now but never with the base."""
        known = self.account.up_to(now.position - 1).of_base
        for key in list(now.measuring.model_scores):
            if key not in known and key not in now.measuring.base_scores:
                now.measuring.of_base(others.subject(key))

    def _others(self, now: _Now) -> _Others:
        """Return the earlier files of the stream, each content once, then those of `evaluation.files`.

        A content that is in the stream is measured as a file of the stream: of its other rows, some were trained.
        """
        places = self.account.up_to(now.position - 1).contents
        asked: dict[str, Subject] = {}
        for name in now.config.evaluation.files:
            try:
                key, sample = self._samples.of_question_file(name, now.config)
            except ConfigError as error:  # it was there when the file began, whose config cannot be changed any more
                self._ledger.add_event("warning", f"{error.what} ({error.where})", now.step)
                continue
            now.measuring.names[key] = name
            asked[key] = Subject(key, partial(_given, sample))
        keys = [key for key in dict.fromkeys([*places, *asked]) if key != now.row.sha256]

        def subject(key: str) -> Subject:
            row = self._ledger.at_position(places[key]) if key in places else None
            return asked[key] if row is None else self._subject(now, row, None)

        return _Others(keys, subject)

    def _subject(self, now: _Now, row: FileRow, tokens: TokenizedFile | None) -> Subject:
        own = now.config if row.config is None or row.id == now.row.id else None

        def sample() -> Sample | None:
            config = own or stored_config(self._ledger.config_of(row))
            try:
                return self._samples.of_file(row, config, now.config.evaluation.rows, tokens)
            except (DamagedState, ConfigError) as error:
                self._ledger.add_event("warning", f"{row.name} cannot be measured: {error.what}", now.step)
                return None

        return Subject(row.sha256, sample)


def owed_evaluation(ledger: Ledger) -> FileRow | None:
    """Return the last finished file if its boundary should have been measured but a stop came first."""
    row = ledger.at_position(ledger.last_begun())
    if row is None or row.state != "done" or row.config is None:
        return None
    config = stored_config(ledger.config_of(row))
    return row if config.evaluation.share and not ledger.has_result(row.id, GRID) else None


def adapter_off_is_base(config: Config) -> bool:
    """Whether the model with its adapter off computes what the base does."""
    return config.method != "full" and config.lora.bias == "none" and config.lora.init not in RESIDUAL_INITS


def _given(sample: Sample) -> Sample:
    return sample
