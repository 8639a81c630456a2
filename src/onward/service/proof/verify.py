"""The proof of a run: every claim is recomputed from what is on disk, and named if it does not hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onward.atomic import TEMPORARY_PREFIX
from onward.config import Config, stored_config
from onward.config.text import read_config
from onward.data.plan.order import rows_digest
from onward.data.plan.replay import StreamPlan, replayed_of
from onward.digest import sha256_json, xxh3_file
from onward.errors import OnwardError, is_out_of_space, is_without_temporary
from onward.layout import RunLayout, step_of
from onward.service.intake.archive import require_original
from onward.service.intake.reading import is_regular
from onward.service.knowledge.anchor import FACT, changed_anchors
from onward.service.knowledge.plans import plan_of
from onward.service.moment import require_present, require_same_moment
from onward.service.proof.replay import replay
from onward.service.state.own_parts import start_folder
from onward.service.state.ownership import Ownership
from onward.service.tokenizer import KeptTokenizer, is_tokenizer_of
from onward.store.ledger import Ledger
from onward.store.rows import FileRow, StepRecord
from onward.text import how_many
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.checkpoint import Manifest, inspect_checkpoint
from onward.training.checkpoints.loading import read_optimizer
from onward.training.device.environment import pick_device, require_whole_teams
from onward.training.device.errors import is_of_the_device
from onward.training.measuring.handover import same_measurement
from onward.training.model.base import base_of_run, digest_base
from onward.training.optimizers import optimizer_method, saved_count
from onward.training.schedule import learning_rate

NO_WAY_BACK = "No restore point verifies: restore the files from a copy. To start over: onward reset"


@dataclass(frozen=True)
class Check:
    """One claim: its name, whether it holds, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Proof:
    """All checks of a run, in order."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as `--json` prints it."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


class _Failed(Exception):
    """A claim does not hold; the message says why."""


def verify(layout: RunLayout, ledger: Ledger, *, deep: bool = False) -> Proof:
    """Check every claim of the run; nothing is changed.

    Args:
        deep: also train again from the last boundary, in a scratch directory, and compare bit for bit.

    Raises:
        ConfigError: no computation would be right here, or the config is refused, which says nothing about the run.
    """
    if deep:
        require_whole_teams(pick_device())
    config, newest = read_config(layout.config), ledger.newest_checkpoint()
    if newest is None:
        nothing = _check("state", lambda: _nothing_trained(layout, ledger))
        return Proof([nothing, _check("queue", lambda: _queue(ledger))])
    folder = layout.checkpoint(newest.step)
    found = inspect_checkpoint(folder)
    manifest, problems = found.manifest, found.problems
    checks = [_check("state files", lambda: _state_files(layout, ledger, manifest, problems))]
    checks.append(_check("one checkpoint", lambda: _one_checkpoint(layout, ledger, newest.step)))
    if manifest is not None:
        known = manifest
        checks.append(_check("root files", lambda: _root_files(layout, known)))
        checks.append(_check("step counters", lambda: _counters(layout, ledger, known)))
    checks += [
        _check("rows", lambda: _rows(ledger)),
        _check("learning rates", lambda: _learning_rates(ledger)),
        _check("handovers", lambda: _handovers(ledger, newest.step)),
        _check("restore points", lambda: _restore_points(layout, ledger)),
        _check("originals", lambda: _originals(layout, ledger)),
        _check("base model", lambda: _base(layout, ledger, config)),
        *([_check("anchor", lambda: _anchor(layout, ledger))] if ledger.get(FACT) else []),
    ]
    if deep:
        checks.append(_check("replay", lambda: replay(layout, ledger)))
    return Proof(checks)


def _check(name: str, claim: Callable[[], str]) -> Check:
    try:
        return Check(name, True, claim())
    except Exception as error:
        if is_of_the_device(error) or is_out_of_space(error) or is_without_temporary(error):
            raise  # it says nothing about the run
        if isinstance(error, FileNotFoundError) and error.filename:
            return Check(name, False, f"{Path(str(error.filename)).name} is missing")
        is_known = isinstance(error, (_Failed, OnwardError))  # damage also takes unforeseen forms
        return Check(name, False, str(error) if is_known else f"{type(error).__name__}: {error}")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise _Failed(problem)


def _nothing_trained(layout: RunLayout, ledger: Ledger) -> str:
    require_same_moment(layout, ledger)
    return "nothing has been trained yet"


def _queue(ledger: Ledger) -> str:
    return f"waiting: {how_many(ledger.queued(), 'file')}"


def _state_files(layout: RunLayout, ledger: Ledger, manifest: Manifest | None, problems: list[str]) -> str:
    if manifest is None or problems:
        require_present(layout, ledger)  # nothing is repaired where a start is refused
        require_same_moment(layout, ledger)
        can_go_back = any(inspect_checkpoint(point).verified for point in Ownership(layout, ledger).restore_points())
        way = "onward train repairs it from a restore point" if can_go_back else NO_WAY_BACK
        raise _Failed(f"{'; '.join(problems)}. {way}")
    return f"{how_many(len(manifest.files), 'file')}, {manifest.size / 1e6:.1f} MB, hashes equal"


def _one_checkpoint(layout: RunLayout, ledger: Ledger, step: int) -> str:
    require_same_moment(layout, ledger)
    ownership = Ownership(layout, ledger)
    names = [folder.name for folder in ownership.checkpoints()]
    newest, *older = names or [""]
    _require(newest == f"checkpoint-{step}", f"current_model has {names}, the ledger says checkpoint-{step}")
    _require(not older, f"an interrupted commit left {', '.join(older)} beside {newest}; onward train removes it")
    copies = [path for path in layout.archive.glob(f"{TEMPORARY_PREFIX}*") if is_regular(path)]
    left = [*filter(ownership.left, layout.temporaries()), *copies]
    _require(not left, f"an interrupted write left {', '.join(map(str, left))}; onward train removes it")
    others = [str(folder.relative_to(layout.root)) for folder in ownership.others()]
    return "; not made by this run, and left alone: ".join([newest, ", ".join(others)] if others else names)


def _root_files(layout: RunLayout, manifest: Manifest) -> str:
    for name, entry in manifest.files.items():
        path = layout.current / name
        _require(path.is_file(), f"current_model/{name} is missing")
        kept = layout.checkpoint(manifest.step) / name
        same = (kept.exists() and path.samefile(kept)) or xxh3_file(path) == entry["xxh3"]
        _require(same, f"current_model/{name} is not that of checkpoint-{manifest.step}")
    return f"{len(manifest.files)} files are those of the checkpoint"


def _counters(layout: RunLayout, ledger: Ledger, manifest: Manifest) -> str:
    folder = layout.checkpoint(manifest.step)
    method = optimizer_method(stored_config(manifest.config))
    counted = saved_count(method, read_optimizer(folder / huggingface.OPTIMIZER, mapped=True))
    _require(counted >= 0, "the optimizer has not counted the same steps for every weight: some were never trained")
    counters = manifest.state["counters"]
    values = {
        "ledger": ledger.committed_step(),
        "ledger's steps": int(ledger.get("origin_step", 0)) + ledger.count_steps(manifest.step),
        "manifest": counters["step"],
        "trainer_state.json": json.loads((folder / huggingface.TRAINER_STATE).read_bytes())["global_step"],
        "Adam": counted + counters["adam_origin"],
    }
    _require(set(values.values()) == {manifest.step}, f"the counters differ: {values}")
    _require_stream(ledger, manifest)
    _require_logged(ledger, json.loads((folder / huggingface.TRAINER_STATE).read_bytes())["log_history"])
    return f"{manifest.step} in {', '.join(values)}"


def _require_stream(ledger: Ledger, manifest: Manifest) -> None:
    """Check that the checkpoint is of the files that the ledger has, in their order, and of as many tokens."""
    stream, cursor = "", manifest.cursor
    for row in ledger.in_stream(0, cursor.position):
        stream = sha256_json([stream, row.sha256])
    _require(stream == cursor.stream, "the state is of other files than the ledger has, or of another order")
    counted = ledger.count_trained_up_to(manifest.step)
    stated = {key: manifest.state["counters"][key] for key in counted}
    _require(counted == stated, f"the ledger's steps trained {counted}, the checkpoint says {stated}")
    wrong = [f"{row['name']} from step {row['first']} on" for row in ledger.wrong_ranges()]
    _require(not wrong, f"totals kept in the ledger are not those of its steps: {', '.join(wrong)}")


def _require_logged(ledger: Ledger, logged: list[dict[str, Any]]) -> None:
    """Check that the ledger says of the last steps what `trainer_state.json` says."""
    by_step = {entry.get("step", 0): entry for entry in logged}
    first = min(by_step, default=0)
    for row in ledger.files("training", "done"):
        for step in ledger.steps(row.id, first):
            entry = by_step.get(step.step, {})
            for key in ("loss", "grad_norm"):
                here, there = getattr(step, key), entry.get(key, getattr(step, key))
                problem = f"step {step.step} has {key} {here!r} in the ledger, {there!r} in trainer_state.json"
                _require(here == there, problem)


def _trained(ledger: Ledger) -> list[tuple[FileRow, Config, list[StepRecord]]]:
    """Return each file that was begun, the config in force for it and its committed steps."""
    last = ledger.committed_step()
    begun = [row for row in ledger.files("training", "done") if row.config]
    committed = [[step for step in ledger.steps(row.id) if step.step <= last] for row in begun]
    configs = [stored_config(ledger.config_of(row)) for row in begun]
    return list(zip(begun, configs, committed, strict=True))


def _rows(ledger: Ledger) -> str:
    total = held_out = replayed = 0
    for row, config, steps in _trained(ledger):
        plan = plan_of(ledger, row, row.rows, config, row.place)
        place = f"file {row.position} ({row.name})"
        wanted = plan.steps if row.state == "done" else len(steps)
        _require(len(steps) == wanted > 0 or not wanted, f"{place} has {len(steps)} steps instead of {wanted}")
        for index, step in enumerate(steps):
            rows, again = plan.rows_at(index), replayed_of(plan, index)
            here = (step.step_in_file, step.step, step.rows, step.replayed, step.rows_digest)
            counts = (len(rows) - len(again), len(again))
            planned = (index + 1, row.first_step + index + 1, *counts, rows_digest(rows, plan.sources))
            _require(here == planned, f"{place}, step {step.step} trained rows other than those in its order")
        _require_replayed(ledger, row, plan, len(steps))
        total += sum(step.rows for step in steps)
        replayed += sum(step.replayed for step in steps)
        held_out += len(plan.held_out)
    kept = f", except {held_out} held out, which were never trained" if held_out else ""
    again = f"; {how_many(replayed, 'row')} replayed, each as chosen" if replayed else ""
    return f"{how_many(total, 'row')} trained, every row of every finished file exactly `epochs` times{kept}{again}"


def _require_replayed(ledger: Ledger, row: FileRow, plan: StreamPlan, steps: int) -> None:
    """Check what was recorded about replayed and held-out rows against the plan."""
    place = f"file {row.position} ({row.name})"
    chosen = [(row.first_step + index + 1, *again) for index in range(steps) for again in replayed_of(plan, index)]
    recorded = [entry for entry in ledger.replayed_rows(row.id) if entry[0] <= row.first_step + steps]
    _require(recorded == chosen, f"{place}: the rows recorded as replayed are not those that were chosen")
    counted = f"{place}: {row.held_out} rows are recorded as held out, {len(plan.held_out)} are"
    _require(row.held_out == len(plan.held_out), counted)


def _learning_rates(ledger: Ledger) -> str:
    count = 0
    for row, config, steps in _trained(ledger):
        for step in steps:
            formula = learning_rate(config, step.step, step.step_in_file)
            problem = f"step {step.step} of {row.name} had {step.learning_rate!r}, the formula says {formula!r}"
            _require(step.learning_rate == formula, problem)
            count += 1
    return f"{how_many(count, 'step')} equal to the schedule's formula"


def _handovers(ledger: Ledger, committed: int) -> str:
    classes: list[str] = []
    for row in ledger.files("training", "done"):
        if row.start_step is None or row.start_step >= committed:  # it is kept before anything later is committed
            continue
        found = [entry for entry in ledger.handovers(row.id) if entry.step == row.start_step]
        boundary = [entry for entry in found if entry.kind == "boundary"]
        _require(bool(boundary), f"file {row.position} ({row.name}) has no handover at step {row.start_step}")
    for entry in ledger.handovers():
        before, after = json.loads(entry.before), json.loads(entry.after)
        for key in ("weights", "moments", "adam_step", "learning_rate"):
            _require(before[key] == after[key], f"the handover at step {entry.step} differs in {key}")
        equal = entry.name != "bitwise" or same_measurement(before, after)
        _require(equal, f"the handover at step {entry.step} is not bitwise")
        classes.append(entry.name)
    counts = {name: classes.count(name) for name in dict.fromkeys(classes)}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none yet"


def _restore_points(layout: RunLayout, ledger: Ledger) -> str:
    points = Ownership(layout, ledger).restore_points()
    for point in points:
        found = inspect_checkpoint(point)
        _require(found.verified is not None, f"{point.name}: {'; '.join(found.problems)}")
    if not points:
        return "none is kept"
    return f"{len(points)} verify (steps {', '.join(str(step_of(point)) for point in reversed(points))})"


def _originals(layout: RunLayout, ledger: Ledger) -> str:
    rows = ledger.files("queued", "training", "done")
    for row in rows:
        _require(layout.kept(row.copy).is_file(), f"{row.copy} is missing")
        require_original(layout, row)
    return f"{how_many(len(rows), 'file')}, SHA-256 equal"


def _anchor(layout: RunLayout, ledger: Ledger) -> str:
    wrong = changed_anchors(layout, ledger)
    _require(not wrong, f"missing, or not what the base wrote, as it does again when needed: {', '.join(wrong)}")
    return f"{', '.join(ledger.get(FACT))}, hashes equal"


def _base(layout: RunLayout, ledger: Ledger, config: Config) -> str:
    identity = ledger.get("identity") or {}
    start_folder(layout, ledger, config)  # raises if the adapter that the run starts from was changed
    folder = base_of_run(layout.root, config.model)
    digest = digest_base(folder)
    _require(digest == identity.get("base"), "the base model changed on disk since this run began")
    tokenizer = KeptTokenizer(layout, layout.tokenizer(folder)).state(config, ledger)
    _require(
        is_tokenizer_of(identity, tokenizer), "the tokenizer or chat template changed on disk since this run began"
    )
    return f"unchanged ({digest[:12]})"
