"""The model card: what the ledger says about a state, as README.md with a picture of the loss."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from onward.config import stored_config
from onward.config.text import read_config
from onward.curve import COLUMNS, read_curve
from onward.errors import OnwardError
from onward.layout import RunLayout
from onward.service.knowledge.table import ANSWERS, BEFORE, GRID
from onward.status import read_grid, read_history
from onward.store.ledger import Ledger
from onward.text import printable
from onward.training.model.base import is_own_base
from onward.training.model.embedded import EMBEDDED
from onward.version import __version__
from onward.views.export.curve import curve
from onward.views.grid import ELSEWHERE, ON_PAPER, TRAINED, part_of
from onward.views.points import Point

CARD, CURVE = "README.md", "loss.svg"
_LEFT_OUT = ("notify", "model", "adapter", "chat_template")
"""Config keys that are about this machine, or that the card gives elsewhere."""


@dataclass(frozen=True)
class BaseFacts:
    """What the card says about the base: the name under which others find it, its digest and its licence."""

    name: str
    digest: str
    licence: str


def base_facts(layout: RunLayout, folder: Path, digest: str) -> BaseFacts:
    """Return what is known about a run's base model; a folder of this machine is named by its last part,
    and the model that a run made for itself by the run."""
    name = read_config(layout.config).model
    if name in EMBEDDED:
        return BaseFacts(EMBEDDED[name].model, digest, EMBEDDED[name].licence)
    if is_own_base(layout.root, folder):
        return BaseFacts(f"{layout.root.absolute().name}-base", digest, _licence(folder))
    known = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else folder.name
    return BaseFacts(known, digest, _licence(folder))


def write_card(
    layout: RunLayout, point: Point, base: BaseFacts, folder: Path, facts: dict[str, str], proof: str
) -> None:
    """Write the card and the picture into a folder.

    Args:
        facts: what else the card says about the files, by name: their format, the difference made by merging.
        proof: what `onward verify` found, as returned by `proof_of` or `verify_now`.
    """
    steps = _steps(layout, point.step)  # read first: another process may go back meanwhile, and leave none of them
    last = steps[-1][0] if steps else 0
    history = [
        _up_to(entry, steps)
        for entry in read_history(layout)
        if entry["position"] and entry["last_step"] and entry["first_step"] <= last
    ]
    picture = curve(steps, [entry["last_step"] for entry in history])
    if picture:
        (folder / CURVE).write_text(picture, encoding="utf-8")
    parts = [
        _front(base),
        f"# {_cell(base.name.rpartition('/')[2])}, fine-tuned\n\nThe state of {_cell(point.label)} of a run of Onward "
        f"{__version__}: cumulative fine-tuning, in which every file continues the same run.",
        _table(("", ""), [("Base", _cell(base.name)), ("Digest of the base", f"`{base.digest}`"),
                          ("Licence of the base", _cell(base.licence)), *facts.items(), *_origin(point)]),
        "## Stream\n\n" + _table(
            ("#", "File", "SHA-256", "Rows", "Tokens", "Steps", "Loss, first and last", "Handover"),
            [_file(entry) for entry in history],
        ),
        f"## Loss\n\n![loss over all steps]({CURVE})" if picture else "",
        _results(layout, history),
        f"## Proof\n\n{proof}",
        f"## Config\n\n```yaml\n{_config(layout, point)}```",
    ]  # fmt: skip
    (folder / CARD).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def copy_card(published: Path, folder: Path, facts: Mapping[str, str]) -> bool:
    """Write the card that a release was published with, as it was edited since; return False if it has none.

    The ledger would tell of the run as it is now, which the release does not contain.

    Args:
        published: the release's files.
        facts: what the card says of these files in addition, as for `write_card`.
    """
    if not (published / CARD).is_file():
        return False
    text = (published / CARD).read_bytes().rstrip()
    (folder / CARD).write_bytes(text + f"\n\n## Files\n\n{_table(('', ''), list(facts.items()))}\n".encode())
    if (published / CURVE).is_file():
        (folder / CURVE).write_bytes((published / CURVE).read_bytes())
    return True


def _front(base: BaseFacts) -> str:
    values: dict[str, Any] = {"tags": ["onward"], "pipeline_tag": "text-generation"}
    if "/" in base.name:
        values["base_model"] = base.name
    if base.licence != "unknown":
        values["license"] = base.licence.lower()
    return f"---\n{yaml.safe_dump(values, allow_unicode=True)}---"


def _steps(layout: RunLayout, last: int | None) -> list[tuple[int, float]]:
    step, loss = COLUMNS.index("step"), COLUMNS.index("loss")
    with Ledger(layout.ledger, read_only=True) as ledger:
        return [(int(row[step]), float(row[loss])) for row in read_curve(ledger, last=last)]


def _up_to(entry: dict[str, Any], steps: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Return a file's entry as of the last of some steps: a process may have trained on since the state."""
    step, loss = steps[-1]
    return entry if entry["last_step"] <= step else {**entry, "last_step": step, "last_loss": loss}


def _origin(point: Point) -> list[tuple[str, str]]:
    if point.manifest is None:
        return []
    manifest = point.manifest
    machine = ", ".join(f"{key} {manifest.environment[key]}" for key in ("torch", "transformers", "peft", "device"))
    return [
        ("Step", str(manifest.step)),
        ("Digest of weights and moments", f"`{manifest.state_digest}`"),
        ("Tokenizer", f"`{manifest.tokenizer}`"),
        ("Trained with", _cell(machine)),
    ]


def _file(entry: dict[str, Any]) -> tuple[str, ...]:
    losses = " to ".join(f"{entry[key]:.4g}" for key in ("first_loss", "last_loss") if entry[key] is not None)
    return (
        str(entry["position"]), _cell(entry["name"]), f"`{entry['sha256']}`", str(entry["rows"]), str(entry["tokens"]),
        f"{entry['first_step']} to {entry['last_step']}", losses, entry["handover"] or "",
    )  # fmt: skip


def _results(layout: RunLayout, history: Sequence[dict[str, Any]]) -> str:
    """Return what was measured at boundaries: the grid, and what other hooks measured, if anything."""
    places = {entry["position"] for entry in history}
    parts = [_grid(read_grid(layout), places)]
    with Ledger(layout.ledger, read_only=True) as ledger:
        rows = [
            (str(entry["position"]), _cell(name), f"`{_cell(json.dumps(value))}`")
            for entry in history
            if (file := ledger.at_position(entry["position"])) is not None
            for name, value in ledger.boundary_results(file.id).items()
            if name not in (GRID, BEFORE, ANSWERS)
        ]
    if rows:
        parts.append("## Measured at boundaries\n\n" + _table(("After file", "What", "Value"), rows))
    return "\n\n".join(part for part in parts if part)


def _grid(grid: dict[str, Any], places: Collection[int]) -> str:
    """Return the losses of the grid for the newest files and boundaries of a state, one line per boundary."""
    shown = sorted(places)[-ON_PAPER:]
    part = part_of(grid, shown.__contains__)
    lines = [
        (after, [*losses, anchor])
        for after, losses, anchor in zip(part["after"], part["loss"], part["anchor"], strict=True)
    ]
    if not any(value is not None for after, values in lines if after for value in values):
        return ""
    rows = [
        ("base" if after == 0 else str(after), *(_loss(part, (line, at), value) for at, value in enumerate(values)))
        for line, (after, values) in enumerate(lines)
    ]
    names = [f"{_cell(file['name'])}{_cell(TRAINED) * bool(file['trained'])}" for file in part["files"]]
    words = "Mean loss on the rows of each file that it is measured on, and the KL divergence from the base, in nats."
    if any(file["trained"] for file in part["files"]):
        words += f" {_cell(TRAINED)} measured on rows that were trained: retention, not generalization."
    if part["other_rows"]:
        words += (
            f" {_cell(ELSEWHERE)} measured on other rows than the newest of the column: not to be compared with it."
        )
    if len(shown) < len(places):
        words += f" The newest {len(shown)} of {len(places)} files are shown."
    return f"## What it knows\n\n{words}\n\n" + _table(("After file", *names, "KL from the base"), rows)


def _loss(grid: Mapping[str, Any], cell: tuple[int, int], value: float | None) -> str:
    return "" if value is None else f"{value:.4f}{_cell(ELSEWHERE) * (list(cell) in grid['other_rows'])}"


def verify_now(layout: RunLayout) -> str:
    """Verify the run, and return what the card says about the proof.

    A proof takes the run's lock, which a process may hold, or which this user or a full disk may not allow.
    """
    from onward.run import Run

    try:
        proof = Run(layout.root).verify()
    except (OnwardError, sqlite3.Error, OSError) as error:
        why = error.what if isinstance(error, OnwardError) else getattr(error, "strerror", None) or str(error)
        return f"`onward verify` was not run: {_cell(why)}."
    return proof_of({check.name: check.ok for check in proof.checks})


def proof_of(checks: Mapping[str, bool]) -> str:
    """Return what the card says about a proof, by whether each of its checks holds."""
    failed = ", ".join(name for name, ok in checks.items() if not ok)
    verdict = f"FAILED: {failed}" if failed else "everything holds"
    return f"`onward verify` when this was written: {verdict} ({', '.join(checks)})."


def _config(layout: RunLayout, point: Point) -> str:
    """Return the config of a state as YAML, without what is about this machine: files are named by their last part."""
    config = read_config(layout.config) if point.manifest is None else stored_config(point.manifest.config)
    values = config.recorded()
    values["evaluation"]["files"] = [Path(name).name for name in values["evaluation"]["files"]]
    return yaml.safe_dump({key: value for key, value in values.items() if key not in _LEFT_OUT}, sort_keys=False)


def _licence(folder: Path) -> str:
    """Return the licence that a base's own card states; "unknown" if it states none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return "unknown"
    stated = cast(dict[str, Any], front).get("license") if isinstance(front, dict) else None
    return stated if isinstance(stated, str) else "unknown"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return untrusted text in a form that is safe in a table: printable, no Markdown, no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", printable(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")
