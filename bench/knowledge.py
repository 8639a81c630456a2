"""What a model keeps of five domains that it is trained on one after another, and what keeping it costs.

`python bench/knowledge.py [--data FOLDER] [--rows 150] [--model MODEL]`. Each policy trains the same five files in the
same number of steps of new rows; the upper bound trains all of them shuffled as one file, the usual practice begins
each file with a fresh optimizer. A tenth of each file's rows is kept out and measured at every boundary. Results go to
`bench/out/knowledge.jsonl` as they come, so that a run that was cut goes on where it was, and to `bench/KNOWLEDGE.md`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import measuring

HERE = Path(__file__).parent
OUT, PAGE, REMARKS = HERE / "out" / "knowledge.jsonl", HERE / "KNOWLEDGE.md", HERE / "KNOWLEDGE-REMARKS.md"
HELD_OUT = 0.1
"""Share of each file's rows that no policy trains."""
SETTINGS: dict[str, Any] = {
    "batch_size": 8, "learning_rate": 5e-4, "warmup_steps": 5, "lora": {"rank": 16, "dropout": 0.0},
    "holdout": 0.0, "keep_boundaries": 1, "keep_days": 0, "save_steps": 1000, "guard": {"action": "off"},
    "anchor": {"rows": 16, "tokens": 64},
}  # fmt: skip
POLICIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "fresh optimizer per file": {"boundary": "reset_moments"},
    "replay 1 %": {"replay": {"share": 0.01}},
    "replay 5 %": {"replay": {"share": 0.05}},
    "replay 10 %": {"replay": {"share": 0.1}},
    "replay 5 %, forgotten": {"replay": {"share": 0.05, "policy": "forgotten"}},
    "anchor": {"anchor": {**SETTINGS["anchor"], "weight": 0.1}},
    "replay 5 % and anchor": {"replay": {"share": 0.05}, "anchor": {**SETTINGS["anchor"], "weight": 0.1}},
}
JOINT = "all at once"
IN_THREE_ORDERS = ("nothing", "replay 5 %")
"""Policies that are tried in two more orders of the files, for how much their figures depend on it."""
PUBLISHED = (
    "Scialom et al. 2022: 1 % of replay nearly keeps eight tasks.",
    "Ibrahim et al. 2024: 1 to 5 % for a weak shift of the data, up to 50 % for a strong one.",
    "arXiv:2605.26097: KL on text of the model itself keeps more than KL on raw text of the web.",
    "arXiv:2605.29495: 1 % of on-policy text moves backward transfer from -13.9 to -2.3.",
)


@dataclass(frozen=True)
class Trial:
    """One training: a policy, and the order in which the domains come."""

    policy: str
    order: tuple[str, ...]

    @property
    def key(self) -> str:
        """What a result is known by."""
        return f"{self.policy} | {' '.join(self.order)}"


@dataclass(frozen=True)
class Domains:
    """The rows of each domain: those that are trained, and those that never are."""

    trained: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    held_out: dict[str, list[str]] = field(default_factory=dict[str, list[str]])


def read_domains(data: Path | None, count: int) -> Domains:
    """Return five domains of `count` rows each: files of a folder, or kinds of text of the standard library."""
    domains = Domains()
    rows = _rows_of_files(sorted(data.glob("*.jsonl"))[:5]) if data is not None else _rows_of_library()
    for name, lines in rows.items():
        chosen = random.Random(0).sample(lines, min(count, len(lines)))
        kept = max(1, round(HELD_OUT * len(chosen)))
        domains.held_out[name], domains.trained[name] = chosen[:kept], chosen[kept:]
    return domains


def _rows_of_files(paths: Sequence[Path]) -> dict[str, list[str]]:
    return {path.stem: path.read_text(encoding="utf-8").splitlines() for path in paths}


def _rows_of_library() -> dict[str, list[str]]:
    """Docstrings in five kinds by the module that they are of, and by length."""
    texts = measuring.docstrings()
    kinds: dict[str, list[str]] = {}
    for text in texts:
        first = text.split(".", 1)[0]
        kinds.setdefault(first, []).append(json.dumps({"text": text}))
    largest = sorted(kinds, key=lambda kind: (-len(kinds[kind]), kind))[:5]
    return {kind: kinds[kind] for kind in largest}


def trials(domains: Domains) -> Iterator[Trial]:
    """Yield what is trained, the most telling first, so that a run that is cut tells the most."""
    names = tuple(domains.trained)
    yield Trial(JOINT, names)
    for policy in ("nothing", "replay 5 %", "fresh optimizer per file", "replay 10 %", "anchor",
                   "replay 5 % and anchor", "replay 5 %, forgotten", "replay 1 %"):  # fmt: skip
        yield Trial(policy, names)
    for turn in (2, 4):
        for policy in IN_THREE_ORDERS:
            yield Trial(policy, names[turn:] + names[:turn])


def measure(trial: Trial, domains: Domains, model: str, length: int) -> dict[str, Any]:
    """Train one trial and return its figures."""
    from onward import Run
    from onward.store.ledger import Ledger

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        questions = [_write(work / f"held-out-{domain}.jsonl", rows) for domain, rows in domains.held_out.items()]
        asked = {"rows": max(map(len, domains.held_out.values())), "share": 1.0, "files": list(map(str, questions))}
        settings = {**SETTINGS, **POLICIES.get(trial.policy, {}), "evaluation": asked, "max_length": length}
        run = Run.create(work / "run", model, **settings)
        begun = time.perf_counter()
        run.train(*_files(work, trial, domains))
        seconds = time.perf_counter() - begun
        with Ledger(run.layout.ledger, read_only=True) as ledger:
            tokens = ledger.trained_tokens(1 << 60)
        return {"key": trial.key, "policy": trial.policy, "order": trial.order, "tokens": tokens, "seconds": seconds,
                "steps": run.status()["global_step"], **_figures(run.layout, trial, domains)}  # fmt: skip


def _files(work: Path, trial: Trial, domains: Domains) -> list[Path]:
    if trial.policy != JOINT:
        return [_write(work / f"{domain}.jsonl", domains.trained[domain]) for domain in trial.order]
    rows = [row for domain in trial.order for row in domains.trained[domain]]
    random.Random(1).shuffle(rows)
    return [_write(work / "all.jsonl", rows)]


def _write(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def _figures(layout: Any, trial: Trial, domains: Domains) -> dict[str, Any]:
    """Return losses on the held-out rows at the end and right after each domain, and the distance from the base."""
    from onward.views.grid import read_grid

    grid = read_grid(layout)
    names = [Path(file["name"]).stem.removeprefix("held-out-") for file in grid["files"]]
    columns = {name: at for at, name in enumerate(names) if grid["files"][at]["position"] is None}
    last = {name: grid["loss"][-1][columns[name]] for name in domains.held_out}
    grown = {}
    for place, name in enumerate(trial.order, start=1) if trial.policy != JOINT else ():
        seen = [row[columns[name]] for row, after in zip(grid["loss"], grid["after"], strict=True) if after >= place]
        best = min(value for value in seen if value is not None)
        grown[name] = last[name] / best - 1.0
    return {
        "losses": last,
        "average": fmean(last.values()),
        "forgetting": fmean(grown.values()) if grown else None,
        "worst": max(grown.values()) if grown else None,
        "kl": grid["anchor"][-1],
    }


def results() -> dict[str, dict[str, Any]]:
    """Return what was measured so far, by trial."""
    if not OUT.is_file():
        return {}
    return {found["key"]: found for found in map(json.loads, OUT.read_text(encoding="utf-8").splitlines())}


def render(found: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    """Return `KNOWLEDGE.md`."""
    machine = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = ["# What the model keeps", "", f"Written by `make knowledge`. {machine}.", ""]
    lines += ["Five domains one after another. Loss: mean over the held-out rows of all five at the end, in nats."]
    lines += ["Forgetting: the loss at the end by the best loss since the domain was trained, less 1.", ""]
    columns = ("policy", "trainings", "loss", "against all at once", "forgetting", "worst", "KL from the base")
    lines += [f"| {' | '.join(columns)} | extra tokens |", "|---" * (len(columns) + 1) + "|"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in found.values():
        groups.setdefault(each["policy"], []).append(each)
    joint = fmean(each["average"] for each in groups[JOINT]) if JOINT in groups else None
    plain = fmean(each["tokens"] for each in groups["nothing"]) if "nothing" in groups else None
    for policy in (JOINT, *POLICIES):
        if policy in groups:
            lines.append(_row(policy, groups[policy], joint, plain))
        else:
            lines.append(f"| {policy} | not run | | | | | | |")
    lines += ["", "Published beside it:", "", *(f"- {text}" for text in PUBLISHED), ""]
    if REMARKS.is_file():
        lines += [REMARKS.read_text(encoding="utf-8").strip(), ""]
    return "\n".join(lines)


def _row(policy: str, trained: Sequence[dict[str, Any]], joint: float | None, plain: float | None) -> str:
    average = fmean(each["average"] for each in trained)
    against = f"{average / joint - 1:+.1%}" if joint else ""
    extra = f"{fmean(each['tokens'] for each in trained) / plain - 1:+.1%}" if plain and policy != JOINT else ""
    cells = [_mean(trained, name) for name in ("average", "forgetting", "worst", "kl")]
    return f"| {policy} | {len(trained)} | {cells[0]} | {against} | {cells[1]} | {cells[2]} | {cells[3]} | {extra} |"


def _mean(trained: Sequence[dict[str, Any]], name: str) -> str:
    values = [each[name] for each in trained if each[name] is not None]
    if not values:
        return ""
    form = "{:.1%}" if name in ("forgetting", "worst") else "{:.4f}"
    apart = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return form.format(fmean(values)) + apart


def main() -> None:
    """Measure what is not measured yet, and write the page after each training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row at most")
    parser.add_argument("--render", action="store_true", help="only write the page from what was measured")
    options = parser.parse_args()
    about = {**measuring.machine(), "model": options.model, "rows": options.rows, "data": options.data is not None}
    domains = read_domains(options.data, options.rows)
    OUT.parent.mkdir(exist_ok=True)
    for trial in () if options.render else trials(domains):
        if trial.key in results():
            continue
        print(f"{trial.key} ...", file=sys.stderr, flush=True)
        found = measure(trial, domains, options.model, options.length)
        with OUT.open("a", encoding="utf-8") as kept:
            kept.write(json.dumps(found) + "\n")
        PAGE.write_text(render(results(), about), encoding="utf-8")
    PAGE.write_text(render(results(), about), encoding="utf-8")


if __name__ == "__main__":
    main()
