"""Compares policies by measurement: trains the last files of the stream under other settings, each on a copy of the
run.

At its end each copy is measured on every file. Its grid would not do: what that measures depends on how many tokens and
steps were trained, so that means over different files would be compared. Two trainings that differ only in the order of
their rows also give different figures: how far those are apart is the noise that a difference has to exceed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from onward.config import Config, stored_config
from onward.config.keys import acts
from onward.config.text import parse_config, parse_settings, read_config, render_yaml
from onward.digest import sha256_json
from onward.errors import ConfigError, TrainingError, UsageError
from onward.events import Observe
from onward.layout import RunLayout
from onward.run import Run
from onward.service.knowledge.table import Table, read_table
from onward.service.state.copying import copy_run
from onward.service.state.ownership import Ownership
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger
from onward.store.rows import FileRow
from onward.views.evaluate import measure
from onward.views.points import own_folder

FIGURES = ("average", "forgetting", "worst", "anchor")
"""What is compared: current mean loss over all files, mean and worst forgetting, KL from the base on its own texts."""


@dataclass(frozen=True)
class Variant:
    """Settings that are tried together, as they were typed, and by key."""

    text: str
    settings: Mapping[str, Any]

    def applied(self, config: Config) -> Config:
        """Return a config with these settings.

        Raises:
            ConfigError: they conflict with its other keys.
        """
        return parse_config({**config.flat(), **self.settings}, where=self.text)


@dataclass(frozen=True)
class Trial:
    """One training of the files under a variant: the order of rows it had, and its figures (None: not measured)."""

    order: int
    figures: Mapping[str, float | None]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a variant: one trial per order of rows, with the same orders for every variant."""

    variant: Variant
    trials: tuple[Trial, ...]

    def values(self, figure: str) -> list[float]:
        """Return a figure of every trial that has it."""
        return [value for trial in self.trials if (value := trial.figures[figure]) is not None]

    def less(self, other: Outcome) -> list[float]:
        """Return how far the average loss is below that of another variant, for each order of rows."""
        pairs = zip(self.trials, other.trials, strict=True)
        losses = [(here.figures["average"], there.figures["average"]) for here, there in pairs]
        return [there - here for here, there in losses if here is not None and there is not None]


@dataclass(frozen=True)
class Comparison:
    """Variants on the same files.

    Args:
        step: the restore point that every trial began at.
        files: names of the files that were trained again.
    """

    step: int
    files: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def ranked(self) -> list[Outcome]:
        """The variants by average loss, the best first; those without one last."""
        return sorted(self.outcomes, key=lambda outcome: fmean(outcome.values("average") or [float("inf")]))

    @property
    def lead(self) -> float | None:
        """How much lower the average loss of the best variant is than that of the second."""
        leads = self._leads()
        return fmean(leads) if leads else None

    @property
    def noise(self) -> float | None:
        """How far that lead differs between orders of rows, maximum minus minimum; None if no two trainings differ."""
        return spread(self._leads()) if self._orders_differ else None

    @property
    def _orders_differ(self) -> bool:
        """Whether the order of rows made any difference: it makes none if each file fits into one step."""
        return any(trial.figures != outcome.trials[0].figures for outcome in self.outcomes for trial in outcome.trials)

    @property
    def is_decided(self) -> bool:
        """Whether the best variant leads by more than the noise."""
        return self.lead is not None and self.noise is not None and self.lead > self.noise

    def _leads(self) -> list[float]:
        best, second, *_ = self.ranked
        return best.less(second)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        best = self.ranked[0]
        return {
            "step": self.step,
            "files": list(self.files),
            "variants": [_variant_dict(outcome, best) for outcome in self.ranked],
            "best": None if self.lead is None else best.variant.text,
            "lead": self.lead,
            "noise": self.noise,
            "decided": self.is_decided,
        }


def spread(values: Sequence[float]) -> float | None:
    """Return the range of values, maximum minus minimum; None if there are fewer than two."""
    return max(values) - min(values) if len(values) > 1 else None


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """Read variants: `KEY=VALUE`, or several of them with semicolons between.

    Raises:
        ConfigError: a key is unknown, or does not change how files are trained from the next boundary on.
        UsageError: there are fewer than two, or two are equal.
    """
    variants = [Variant(text, parse_settings((part.strip() for part in text.split(";")), "SETTING")) for text in texts]
    if len({sha256_json(dict(variant.settings)) for variant in variants}) < max(2, len(variants)):
        hint = "For instance: onward compare boundary=carry boundary=reset_moments"
        raise UsageError("give at least two different settings to compare", where="SETTING", hint=hint)
    for variant in variants:
        for key in variant.settings:
            if acts(key) == "at the next file":
                continue
            reason = "is locked in a run that has trained" if acts(key) == "never" else "changes no weight"
            hint = "Compare keys that take effect at the next file; docs/config.md says which do."
            raise ConfigError(f"{key} {reason}, so that nothing can be compared", where=variant.text, hint=hint)
    return variants


@dataclass(frozen=True)
class Trials:
    """How variants are tried.

    Args:
        last: how many files of the stream's end are trained again.
        orders: how many trainings each variant gets, each with another order of rows.
        observe: receives the events of every training.
        report: receives a line when a training begins.
        stop: `stop.ask(reason)` ends it.
    """

    last: int
    orders: int
    observe: Observe
    report: Callable[[str], None]
    stop: Wishes

    def compare(self, layout: RunLayout, variants: Sequence[Variant]) -> Comparison:
        """Train the last files again under each variant, in scratch space; the run is untouched.

        Raises:
            UsageError: there are no such files, or the boundary before them is no longer kept.
            TrainingError: a variant cannot be trained.
            Stopped: it was stopped; the copies are gone.
        """
        step, rows = _beginning(layout, self.last)
        tables = comparable([table for variant in variants for table in self._tables(layout, step, variant)])
        trials = [Trial(place % self.orders, figures_of(table)) for place, table in enumerate(tables)]
        outcomes = [
            Outcome(variant, tuple(trials[place * self.orders :][: self.orders]))
            for place, variant in enumerate(variants)
        ]
        return Comparison(step, tuple(row.name for row in rows), tuple(outcomes))

    def _tables(self, layout: RunLayout, step: int, variant: Variant) -> Iterator[Table]:
        """Yield what was measured of each training of a variant."""
        for order in range(self.orders):
            self.report(f"{variant.text}: training {order + 1} of {self.orders}")
            with own_folder(layout) as scratch:
                copy = copy_run(layout, scratch / "run", step)
                _prepare(copy, variant, order)
                self._train(copy, variant)
                self.stop.check_for_end()  # the training has granted it, and is not complete
                yield measured(copy, self.stop.check_for_end)

    def _train(self, copy: RunLayout, variant: Variant) -> None:
        try:
            Run(copy.root).train(observe=self.observe, stop=self.stop)
        except TrainingError as error:
            hint = "Leave this setting out; the run is unchanged."
            raise TrainingError(error.what, where=variant.text, hint=hint) from None


def measured(layout: RunLayout, look: Callable[[], None] = lambda: None) -> Table:
    """Return the table of a run whose state is at a boundary, with all files measured there.

    Args:
        look: called between two forward passes; may raise to give up.
    """
    now = measure(layout, None, look=look)
    with Ledger(layout.ledger, read_only=True) as ledger:
        table = read_table(ledger)
    newest = {file["sha256"]: file for file in now["files"]}
    return replace(table, scores=[*table.scores[:-1], newest], anchor=[*table.anchor[:-1], now["anchor"]])


def comparable(tables: Sequence[Table]) -> list[Table]:
    """Return tables without the cells that not all of them have, measured on the same rows."""
    common = set[tuple[Any, ...]].intersection(*({cell for cell, _, _ in _cells(table)} for table in tables))
    return [replace(table, scores=_kept(table, common)) for table in tables]


def _kept(table: Table, common: Collection[tuple[Any, ...]]) -> list[dict[str, Mapping[str, Any]]]:
    scores: list[dict[str, Mapping[str, Any]]] = [{} for _ in table.scores]
    for cell, place, key in _cells(table):
        if cell in common:
            scores[place][key] = table.scores[place][key]
    return scores


def _cells(table: Table) -> Iterator[tuple[tuple[Any, ...], int, str]]:
    """Yield for each score what it was measured on (after which file, which rows, how many targets), and its place."""
    for place, (after, row) in enumerate(zip(table.after, table.scores, strict=True)):
        for key, score in row.items():
            yield (after, key, tuple(score["rows"]), score["tokens"]), place, key


def figures_of(measured: Table) -> dict[str, float | None]:
    """Return the current figures of a table; None for what was not measured."""
    table = measured.to_dict()
    forgetting, anchors = table["forgetting"], table["anchor"]
    values = (table["average"], forgetting["mean"], forgetting["worst"], anchors[-1] if anchors else None)
    return dict(zip(FIGURES, values, strict=True))


def _beginning(layout: RunLayout, last: int) -> tuple[int, list[FileRow]]:
    """Return the boundary before the last files of the stream, and those files.

    Raises:
        UsageError: not that many files are done, or that boundary is no longer kept.
    """
    with Ledger(layout.ledger, read_only=True) as ledger:
        done = ledger.files("done")
        kept = Ownership(layout, ledger).restore_steps()
    if len(done) < last:
        what = f"{len(done)} files are done, but {last} would be trained again"
        raise UsageError(what, where="--last", hint="--last 1" if done else "onward train FILE")
    rows = done[-last:]
    step = rows[0].first_step
    if step not in kept:
        possible = [number for number in range(1, len(done) + 1) if done[-number].first_step in kept]
        hint = f"The restore points allow: --last {max(possible)}." if possible else "Train another file first."
        raise UsageError(f"the boundary before {rows[0].name} is no longer kept", where=layout.boundaries, hint=hint)
    return step, rows


def _prepare(copy: RunLayout, variant: Variant, order: int) -> None:
    """Give the files of a copy the config that they had plus the variant's settings, and their rows another order.

    The model is asked today's `evaluation.files`: those of then may be gone. No file is taken back: under each variant
    the same files are trained.
    """
    today = read_config(copy.config)
    asked, unguarded = today.evaluation.files, today.guard.model_copy(update={"action": "off"})
    copy.config.write_text(render_yaml(today.model_copy(update={"guard": unguarded})), encoding="utf-8")
    with Ledger(copy.ledger) as ledger, ledger.transaction():
        for row in ledger.files("queued"):
            config = variant.applied(stored_config(ledger.config_of(row)).asking(asked)).recorded()
            fingerprint = sha256_json(config)
            ledger.keep_config(fingerprint, config)
            ledger.set_file(row.id, config=fingerprint, occurrence=row.occurrence + order)


def _variant_dict(outcome: Outcome, best: Outcome) -> dict[str, Any]:
    values = {figure: outcome.values(figure) for figure in FIGURES}
    behind = best.less(outcome)
    return {
        "setting": outcome.variant.text,
        "mean": {figure: fmean(found) if found else None for figure, found in values.items()},
        "spread": {figure: spread(found) for figure, found in values.items()},
        "behind": {"mean": fmean(behind) if behind else None, "spread": spread(behind)},
        "trainings": [{"order": trial.order, **trial.figures} for trial in outcome.trials],
    }


def lines(comparison: Comparison) -> Iterator[str]:
    """Yield the comparison as lines for people."""
    best, *_ = ranked = comparison.ranked
    width = max(len(outcome.variant.text) for outcome in ranked)
    yield f"{'':{width}}" + "".join(f"{name:>20}" for name in (*FIGURES, "behind the best"))
    for outcome in ranked:
        cells = [_cell(outcome.values(figure)) for figure in FIGURES]
        cells.append("" if outcome is best else _cell(best.less(outcome)))
        yield f"{outcome.variant.text:{width}}" + "".join(f"{cell:>20}" for cell in cells)
    yield _verdict(comparison)


def _cell(values: Sequence[float]) -> str:
    """Return a mean with half of the spread, as 0.1234 +- 0.0012."""
    if not values:
        return "-"
    apart = spread(values)
    return f"{fmean(values):.4f}" if apart is None else f"{fmean(values):.4f} +- {apart / 2:.4f}"


def _verdict(comparison: Comparison) -> str:
    lead, noise = comparison.lead, comparison.noise
    if lead is None:
        return "no file was measured on the same rows under each setting, so that nothing can be compared"
    best = comparison.ranked[0].variant.text
    if noise is None and len(comparison.outcomes[0].trials) > 1:
        return f"{best} is lower by {lead:.4f}; every order of rows trained the same, so the noise is not known"
    if noise is None:
        return f"{best} is lower by {lead:.4f}; with one training each, the noise is not known (--seeds 2)"
    if comparison.is_decided:
        return f"{best} is better: lower by {lead:.4f}, noise {noise:.4f}"
    return f"no difference above the noise: {best} is lower by {lead:.4f}, noise {noise:.4f}"
