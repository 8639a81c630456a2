"""What a model retains of five domains that it is trained on one after another, and what retaining it costs.

`python bench/knowledge.py [--data FOLDER] [--rows 150] [--model MODEL]`. Each policy trains the same five files in the
same number of steps of new rows; the upper bound trains all of them shuffled as one file, the usual practice begins
each file with a fresh optimizer. A tenth of each file's rows is held out by Onward itself and measured at every
boundary. Results go to `bench/out/knowledge.jsonl` as they come, so that a run that was cut short can be continued, and
to `bench/KNOWLEDGE.md`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import knowledge_page
import measuring

OUT = Path(__file__).parent / "out" / "knowledge.jsonl"
HELD_OUT = 0.1
"""The share of each file's rows that no policy trains."""
SHORTEST = 200
"""How many rows of each domain, the shortest ones, are drawn from: none is cut, and everything takes an hour."""
SYSTEM = {"role": "system", "content": "Answer."}
"""The beginning of rows without a system message, because the template's default takes 20 tokens of each."""
LENGTH = 256
"""The most tokens of a row: more than any of these has."""
BATCH = 8
SETTINGS: dict[str, Any] = {
    "batch_size": BATCH, "learning_rate": 5e-4, "warmup_steps": 5, "max_length": LENGTH,
    "lora": {"rank": 16, "dropout": 0.0}, "holdout": HELD_OUT, "keep_boundaries": 1, "keep_days": 0,
    "save_steps": 1000, "guard": {"action": "off"}, "anchor": {"rows": 16, "tokens": 32, "weight": 0.0},
    "replay": {"share": 0.0},
}  # fmt: skip
FRESH_TEXTS = {"rows": 32, "tokens": 32}
"""Texts that the base writes from another seed, on which no policy trains; the divergence is measured on them."""
POLICIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "fresh optimizer per file": {"boundary": "reset_moments"},
    "replay 1 %": {"replay": {"share": 0.01}},
    "replay 5 %": {"replay": {"share": 0.05}},
    "replay 10 %": {"replay": {"share": 0.1}},
    "replay 5 %, forgotten": {"replay": {"share": 0.05, "policy": "forgotten"}},
    "anchor": {"anchor": {**SETTINGS["anchor"], "weight": 0.1}},
    "replay 5 % and anchor": {"replay": {"share": 0.05}, "anchor": {**SETTINGS["anchor"], "weight": 0.1}},
    "anchor of weight 1": {"anchor": {**SETTINGS["anchor"], "weight": 1.0}},
}  # fmt: skip
JOINT = knowledge_page.JOINT
IN_THREE_ORDERS = ("nothing", "replay 5 %")
"""Policies that are tried in two more orders of the files, to see how much their figures depend on it."""
RELEASED = (JOINT, "nothing", "replay 5 %")
"""Policies of which a release with a cooldown is made, too."""
COOLDOWN = 0.1
"""The cooldown steps of a release, as a share of the steps before."""
FIRST = (
    JOINT, "nothing", "replay 5 %", "fresh optimizer per file", "replay 10 %", "anchor of weight 1", "anchor",
    "replay 5 % and anchor", "replay 5 %, forgotten", "replay 1 %",
)  # fmt: skip
"""The policies in the order in which they are tried: the most telling first, in case the run is cut short."""


@dataclass(frozen=True)
class Trial:
    """One training: a policy, and the order in which the domains come."""

    policy: str
    order: tuple[str, ...]

    @property
    def key(self) -> str:
        """The key of a result."""
        return f"{self.policy} | {' '.join(self.order)}"


@dataclass(frozen=True)
class Files:
    """The files of the domains, and, in the same order, their held-out rows as files of their own.

    Args:
        domains: path of each domain's file.
        questions: path of a file with its held-out rows.
        together: the other rows, of all domains, shuffled.
    """

    domains: dict[str, Path]
    questions: dict[str, Path]
    together: Path

    @classmethod
    def make(cls, folder: Path, rows: Mapping[str, Sequence[str]]) -> Files:
        """Write them, holding out the rows that Onward itself will hold out."""
        from onward.data.plan.holdout import count_held_out, held_out_rows
        from onward.digest import sha256_file

        domains, questions, trained = dict[str, Path](), dict[str, Path](), list[str]()
        for name, lines in rows.items():
            domains[name] = _write(folder / f"{name}.jsonl", lines)
            count = count_held_out(len(lines), HELD_OUT)
            held = set(held_out_rows(0, sha256_file(domains[name]), len(lines), count))
            questions[name] = _write(folder / f"held-out-{name}.jsonl", [lines[at] for at in sorted(held)])
            trained += [line for at, line in enumerate(lines) if at not in held]
        random.Random(1).shuffle(trained)
        return cls(domains, questions, _write(folder / "together.jsonl", trained))


def read_domains(data: Path | None, count: int) -> dict[str, list[str]]:
    """Return five domains of `count` rows each: files of a folder, or kinds of text of the standard library."""
    found = _rows_of_files(sorted(data.glob("*.jsonl"))[:5]) if data is not None else _rows_of_library()
    short = {name: sorted(lines, key=lambda line: (len(line), line))[:SHORTEST] for name, lines in found.items()}
    drawn = {name: random.Random(0).sample(lines, min(count, len(lines))) for name, lines in short.items()}
    return {name: [_with_system(line) for line in lines] for name, lines in drawn.items()}


def _with_system(line: str) -> str:
    row = json.loads(line)
    if "messages" not in row or row["messages"][0]["role"] == "system":
        return line
    return json.dumps({**row, "messages": [SYSTEM, *row["messages"]]})


def _rows_of_files(paths: Sequence[Path]) -> dict[str, list[str]]:
    return {path.stem: path.read_text(encoding="utf-8").splitlines() for path in paths}


def _rows_of_library() -> dict[str, list[str]]:
    """Return docstrings in five kinds, by their module."""
    kinds: dict[str, list[str]] = {}
    for text in measuring.docstrings():
        kinds.setdefault(text.split(".", 1)[0], []).append(json.dumps({"text": text}))
    largest = sorted(kinds, key=lambda kind: (-len(kinds[kind]), kind))[:5]
    return {kind: kinds[kind] for kind in largest}


def trials(names: Sequence[str]) -> Iterator[Trial]:
    """Yield the trials."""
    order = tuple(names)
    yield from (Trial(policy, order) for policy in FIRST)
    for turn in (2, 4):
        yield from (Trial(policy, order[turn:] + order[:turn]) for policy in IN_THREE_ORDERS)


def measure(trial: Trial, rows: Mapping[str, Sequence[str]], model: str, dtype: str) -> dict[str, Any]:
    """Train one trial and return its figures."""
    from onward import Run

    with tempfile.TemporaryDirectory() as name:
        files = Files.make(Path(name), rows)
        joint = trial.policy == JOINT
        held = max(len(path.read_text(encoding="utf-8").splitlines()) for path in files.questions.values())
        asked: dict[str, Any] = {"rows": held, "share": 1.0}
        asked |= {"files": [str(path) for path in files.questions.values()]} if joint else {}
        settings = {**SETTINGS, **POLICIES.get(trial.policy, {}), "evaluation": asked, "dtype": dtype}
        settings |= {"holdout": 0.0} if joint else {}
        run = Run.create(Path(name) / "run", model, **settings)
        begun, cpu = time.perf_counter(), time.process_time()
        run.train(*([files.together] if joint else [files.domains[domain] for domain in trial.order]))
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        found = {"key": trial.key, "policy": trial.policy, "order": trial.order, "dtype": dtype, "seconds": seconds,
                 "cpu": cpu, "steps": run.status()["global_step"]}  # fmt: skip
        found |= {"tokens": trained_tokens(run), **figures(run, trial), "kl": divergence(run)}
        if trial.policy in RELEASED and trial.order == tuple(rows):
            found["released"] = released(run, trial, found)
        return found


def trained_tokens(run: Any) -> int:
    """Return the tokens that a run trained, including the anchor's texts in the loss."""
    from onward.store.ledger import Ledger
    from onward.training.steps.anchor import texts_of_step

    with Ledger(run.layout.ledger, read_only=True) as ledger:
        tokens = sum(ledger.tokens_of(row.id) for row in ledger.files("training", "done"))
    anchor, steps = run.config.anchor, run.status()["global_step"]
    return tokens + (steps * texts_of_step(run.config) * anchor.tokens if anchor.weight else 0)


def figures(run: Any, trial: Trial) -> dict[str, Any]:
    """Return losses on the held-out rows at the end, and how much they grew since each domain was known best."""
    from onward.status import read_grid

    grid = read_grid(run.layout)
    columns = {_domain(file["name"]): at for at, file in enumerate(grid["files"]) if _is_asked(file, trial)}
    last = {name: grid["loss"][-1][columns[name]] for name in trial.order}
    best: dict[str, float] = {}
    for place, name in enumerate(trial.order, start=1) if trial.policy != JOINT else ():
        seen = [row[columns[name]] for row, after in zip(grid["loss"], grid["after"], strict=True) if after >= place]
        best[name] = min(value for value in seen if value is not None)
    base = {name: grid["loss"][0][columns[name]] for name in trial.order}
    return {"base": base, "best": best, "kl_on_its_texts": grid["anchor"][-1], **_summed(last, best, trial)}


def _is_asked(file: Mapping[str, Any], trial: Trial) -> bool:
    return (file["position"] is None) == (trial.policy == JOINT)


def _domain(name: str) -> str:
    return Path(name).stem.removeprefix("held-out-")


def _summed(last: Mapping[str, float], best: Mapping[str, float], trial: Trial) -> dict[str, Any]:
    """Return figures of the losses at the end; the last file cannot be forgotten yet."""
    grown = {name: last[name] / best[name] - 1.0 for name in trial.order[:-1] if name in best}
    return {
        "losses": dict(last),
        "average": fmean(last.values()),
        "forgetting": fmean(grown.values()) if grown else None,
        "worst": max(grown.values()) if grown else None,
    }


def divergence(run: Any, at: str | None = None) -> float:
    """Return KL(base || model) in nats per token on texts that the base wrote and that no policy trains on."""
    from onward.library.making import open_ledger
    from onward.service.knowledge.anchor import anchor_rows
    from onward.service.session import open_session
    from onward.training.measuring.scores import Compute, Meter
    from onward.training.model.load import build_model
    from onward.views.points import hold

    with hold(run.layout, at) as point, open_ledger(run.layout) as ledger:
        session = open_session(run.layout, ledger, report=lambda _: None)
        fresh = run.config.anchor.model_copy(update=FRESH_TEXTS)
        config = run.config.model_copy(update={"anchor": fresh, "seed": run.config.seed + 1})
        model = build_model(session.spec, checkpoint=point.folder, treatment=session.treatment)
        meter = Meter(model, Compute(config, session.execution))
        base = meter.without_adapter()
        return meter.divergence(base, anchor_rows(session, config, lambda: base))


def released(run: Any, trial: Trial, found: Mapping[str, Any]) -> dict[str, Any]:
    """Make a release with a cooldown and return its figures, as far as they differ."""
    from onward.events import Event, StepTaken
    from onward.service.wishes import Wishes
    from onward.views.release import Making, Order

    tokens = 0

    def observe(event: Event) -> None:
        nonlocal tokens
        tokens += event.tokens if isinstance(event, StepTaken) else 0

    record = Making(run.layout, observe, lambda _: None, Wishes()).release(Order("v1", cooldown=COOLDOWN))
    if trial.policy == JOINT:
        questions = measured_questions(run, "v1")
        last = {name: questions[name] for name in trial.order}
    else:
        last = {_domain(file["name"]): file["loss"] for file in record["measured"]["files"]}
    return {"tokens": found["tokens"] + tokens, "kl": divergence(run, "v1"), **_summed(last, found["best"], trial)}


def measured_questions(run: Any, at: str) -> dict[str, float]:
    """Return the losses of a release on the files of `evaluation.files`."""
    from onward.library.making import open_ledger
    from onward.service.knowledge.evaluation import Evaluation
    from onward.service.session import open_session
    from onward.training.model.load import build_model
    from onward.views.points import hold

    with hold(run.layout, at) as point, open_ledger(run.layout) as ledger, tempfile.TemporaryDirectory() as scratch:
        session = open_session(run.layout, ledger, report=lambda _: None)
        model = build_model(session.spec, checkpoint=point.folder, treatment=session.treatment)
        evaluation = Evaluation(session, samples=Path(scratch))
        found = evaluation.everything(model, ledger.files("done")[-1], run.config, run.status()["global_step"])
    return {_domain(name): found["model"][key]["loss"] for key, name in found["names"].items()}


def results() -> dict[str, dict[str, Any]]:
    """Return what was measured so far, by trial."""
    if not OUT.is_file():
        return {}
    return {found["key"]: found for found in map(json.loads, OUT.read_text(encoding="utf-8").splitlines())}


def _write(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def native_dtype() -> str:
    """Return the compute type: bfloat16 where the processor has matrix units for it (AMX), else float32."""
    import torch

    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def main() -> None:
    """Measure what was not measured yet, and write the page after each training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", help="compute type; bfloat16 where the processor has matrix units for it")
    parser.add_argument("--only", type=int, help="this many of what is left")
    parser.add_argument("--render", action="store_true", help="only write the page from what was measured")
    options = parser.parse_args()
    dtype = options.dtype or native_dtype()
    about = {**measuring.machine(), "model": options.model, "dtype": dtype, "rows": options.rows,
             "data": options.data.name if options.data else "standard library"}  # fmt: skip
    rows = read_domains(options.data, options.rows)
    OUT.parent.mkdir(exist_ok=True)
    left = [trial for trial in trials(list(rows)) if trial.key not in results()]
    for trial in [] if options.render else left[: options.only]:
        print(f"{trial.key} ...", file=sys.stderr, flush=True)
        found = measure(trial, rows, options.model, dtype)
        with OUT.open("a", encoding="utf-8") as kept:
            kept.write(json.dumps(found) + "\n")
        knowledge_page.write(results(), POLICIES, about)
    knowledge_page.write(results(), POLICIES, about)


if __name__ == "__main__":
    main()
