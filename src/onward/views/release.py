"""Makes a release: a model to publish, from a boundary of the run, on a branch that leaves the run as it is."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onward.atomic import TEMPORARY_PREFIX, discard_tree, fsync_file, publish_directory
from onward.digest import xxh3_file
from onward.errors import UsageError
from onward.events import Observe
from onward.layout import RunLayout, entries
from onward.run import Run
from onward.service.knowledge.evaluation import Evaluation
from onward.service.knowledge.table import read_table
from onward.service.state.copying import copy_run
from onward.service.state.ownership import Ownership
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger
from onward.store.lookup import find_step
from onward.text import how_many, printable, storable
from onward.training.model.roundtrip import prove_roundtrip
from onward.training.model.weights import save_weights
from onward.training.state import digest_tensors
from onward.views.branch import Branch
from onward.views.export.card import base_facts, proof_of, write_card
from onward.views.locked import make_locked
from onward.views.points import Point, own_folder
from onward.views.releases import RECORD

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SHARE = 0.1
"""Steps of a cooldown, as a share of the steps taken so far: Haegele et al. (2024) found a tenth sufficient."""
LEAST = 4
"""The fewest steps of a cooldown whose length is not given."""


@dataclass(frozen=True)
class Order:
    """The requested release.

    Args:
        name: the release's name: letters, digits, `.`, `_` and `-`.
        start: a file or a step, as in `rollback --to`; None for the newest boundary.
        cooldown: steps, or below 1 a share of the steps so far; None for `SHARE`, or for no steps if states are
            averaged.
        average: how many of the last boundaries up to `start` are averaged before the cooldown; 1 is the state itself.
        notes: text for the model card.
    """

    name: str
    start: str | None = None
    cooldown: float | None = None
    average: int = 1
    notes: str = ""

    def steps_of(self, global_step: int) -> int:
        """Return the steps of the cooldown.

        Raises:
            UsageError: it is neither a share below 1 nor a whole number of steps.
        """
        if self.cooldown is None:
            return 0 if self.average > 1 else max(LEAST, round(SHARE * global_step))
        if 0 < self.cooldown < 1:
            return max(1, round(self.cooldown * global_step))
        if self.cooldown < 0 or not float(self.cooldown).is_integer():
            raise UsageError("a cooldown is a number of steps, or a share below 1", where="--cooldown")
        return int(self.cooldown)


@dataclass(frozen=True)
class Making:
    """Makes releases of one run.

    Args:
        observe: receives the steps of the cooldown.
        report: receives a line when something takes long.
        wishes: `wishes.ask(reason)` ends it without leaving anything.
    """

    layout: RunLayout
    observe: Observe
    report: Callable[[str], None]
    wishes: Wishes

    def release(self, order: Order) -> dict[str, Any]:
        """Make a release and return its record; the run's own state is untouched, and its owner does not wait.

        Raises:
            UsageError: the name is taken or invalid, there is no such boundary, or it is no longer kept.
            DamagedState: a restore point is not what was committed.
            Stopped: it was stopped.
        """
        target = self._free(order.name)
        step, averaged = self._boundaries(order)
        steps = order.steps_of(step)
        with self._published(target) as folder, own_folder(self.layout) as scratch:
            copy = copy_run(self.layout, scratch / "run", step)
            self.report("verifying the boundary")
            proof = Run(copy.root).verify()
            with Ledger(copy.ledger) as ledger:
                branch = Branch.at(copy, ledger, step, self.report)
                if len(averaged) > 1:
                    self.report(f"averaging the states of steps {', '.join(map(str, averaged))}")
                    branch.average(self.layout, averaged)
                peak = branch.cool(steps, self.observe, self.wishes.check) if steps else None
                about = {"cooldown": {"steps": steps, "learning_rate": peak}, "averaged": averaged}
                about |= {"verified": proof.ok, "checks": [asdict(check) for check in proof.checks]}
                self.report("measuring it")
                about |= {"measured": measured(branch, ledger)}
                record = self._record(order, ledger, branch, about)
                self._write(folder, branch, record)
        return record

    @contextlib.contextmanager
    def _published(self, target: Path) -> Generator[Path]:
        """Give the body a folder, before anything is computed; afterwards make it the release, if the name is free."""
        is_first = not target.parent.exists()
        target.parent.mkdir(exist_ok=True)
        temporary, lock = make_locked(target.parent, f"{TEMPORARY_PREFIX}release-")  # two of one name never share it
        try:
            yield temporary
            publish_directory(temporary, self._free(target.name))
        finally:
            discard_tree(temporary)
            os.close(lock)
            if is_first:
                with contextlib.suppress(OSError):  # there is a release now
                    target.parent.rmdir()

    def _free(self, name: str) -> Path:
        if NAME.fullmatch(name) is None:
            hint = "Letters, digits, '.', '_' and '-', for instance v1."
            raise UsageError(f"{name!r} cannot be the name of a release", where="NAME", hint=hint)
        target = self.layout.releases / name
        if target.exists():
            hint = f"Choose another name, or remove it: onward releases --remove {name}"
            raise UsageError("a release of this name already exists", where=target, hint=hint)
        return target

    def _boundaries(self, order: Order) -> tuple[int, list[int]]:
        """Return the step to begin at, and the steps of the states to average."""
        with Ledger(self.layout.ledger, read_only=True) as ledger:
            kept = sorted(Ownership(self.layout, ledger).restore_steps())
            if not kept:
                raise UsageError(
                    "nothing has been committed yet", where=self.layout.boundaries, hint="onward train FILE"
                )
            step = kept[-1] if order.start is None else find_step(ledger, order.start, kept, "--from")
        usable = [other for other in kept if 0 < other <= step]
        if order.average > 1 and len(usable) < order.average:
            hint = f"--average {len(usable)} is possible; keep_boundaries in the config keeps more."
            raise UsageError(f"{len(usable)} boundaries are kept up to step {step}", where="--average", hint=hint)
        return step, usable[-order.average :] if order.average > 1 else [step]

    def _record(self, order: Order, ledger: Ledger, branch: Branch, about: Mapping[str, Any]) -> dict[str, Any]:
        manifest, state = branch.manifest, branch.state
        stream = [
            {"position": row.position, "name": row.name, "sha256": row.sha256, "rows": row.rows}
            for row in ledger.files("done")
        ]
        return {
            "name": order.name,
            "notes": storable(order.notes),
            "created": ledger.clock(),
            "run": manifest.run,
            "step": manifest.step,
            "state_digest": manifest.state_digest,
            "base": manifest.base,
            "config": manifest.config,
            "environment": manifest.environment,
            "stream": stream,
            "grid": read_table(ledger).to_dict(),
            **about,
            "weights": digest_tensors(sorted(state.view().weights.items())),
        }

    def _write(self, folder: Path, branch: Branch, record: dict[str, Any]) -> None:
        """Write everything, and prove that it loads back equal."""
        weights = branch.state.view().weights
        save_weights(branch.state.model, weights, folder)
        prove_roundtrip(branch.state.model, folder, weights)
        for name, data in branch.session.facts().static_files.items():
            (folder / name).write_bytes(data)
        self._write_card(folder, branch, record)
        record["files"] = {path.name: xxh3_file(path) for path in entries(folder)}
        (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in entries(folder):
            fsync_file(path)

    def _write_card(self, folder: Path, branch: Branch, record: Mapping[str, Any]) -> None:
        """Write the model card from the ledger of the copy, which ends where the release begins."""
        session, found, averaged = branch.session, record["measured"], record["averaged"]
        cooled = record["cooldown"]["steps"]
        steps = how_many(cooled, "step")
        checks = {check["name"]: check["ok"] for check in record["checks"]}
        facts = {
            "Release": f"{record['name']}: {printable(record['notes'])}" if record["notes"] else record["name"],
            "Cooldown": f"{steps} over rows of the whole stream, to a rate of zero" if cooled else "",
            "Average of the states of steps": ", ".join(map(str, averaged)) if len(averaged) > 1 else "",
            "Average loss over its files": _figure(found["average"]),
            "Forgetting, mean and worst": f"{_figure(found['forgetting']['mean'])}, "
            f"{_figure(found['forgetting']['worst'])}",
            "KL from the base on its own texts": _figure(found["anchor"]),
        }
        label = f"step {record['step']}, made a release"
        point = Point(folder, label, branch.manifest.step, branch.manifest, release=record["name"])
        base = base_facts(session.layout, session.base, session.base_digest)
        told = {name: text for name, text in facts.items() if text}
        write_card(session.layout, point, base, folder, told, proof_of(checks))


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def measured(branch: Branch, ledger: Ledger) -> dict[str, Any]:
    """Measure the branch on every file of its stream; return scores by file, and the figures of the grid."""
    rows = ledger.files("done")
    if not rows:
        return {"files": [], "average": None, "forgetting": {"mean": None, "worst": None, "file": None}, "anchor": None}
    config = branch.config.asking([])
    found = Evaluation(branch.session).everything(branch.state.model, rows[-1], config, branch.state.step)
    table, scores, kl = read_table(ledger), found["model"], found["anchor"] and found["anchor"]["kl"]
    figures = replace(
        table,
        after=[*table.after, rows[-1].place],
        scores=[*table.scores, scores],
        anchor=[*table.anchor, kl],
    ).to_dict()
    files = [
        {"position": column.position, "name": column.name, "sha256": column.key, **scores[column.key]}
        for column in table.columns
        if column.position is not None and column.key in scores
    ]
    forgetting = {key: figures["forgetting"][key] for key in ("mean", "worst", "file")}
    return {"files": files, "average": figures["average"], "forgetting": forgetting, "anchor": kl}
