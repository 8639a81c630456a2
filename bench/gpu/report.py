"""The page of what was seen on a GPU, from the lines that the checks left; what was not run is called so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PUBLISHED = (
    ("Qwen3-0.6B", "Surogate", 53900), ("Qwen3-0.6B", "Unsloth", 21300),
    ("Qwen3-1.7B", "Surogate", 32800), ("Qwen3-1.7B", "Unsloth", 20800),
    ("Llama-3.1-8B", "NeMo AutoModel (rows of 4,096)", 12473), ("Llama-3.1-8B", "Surogate", 10200),
    ("Llama-3.1-8B", "Unsloth", 8900),
)  # fmt: skip
"""Tokens a second that others publish for one H100: LoRA of rank 16, bfloat16, packed rows. Not measured here."""
SOURCES = (
    "Surogate and Unsloth: Surogate's own comparison, as it was noted for this project in 2026. NeMo AutoModel: its "
    "[performance summary](https://docs.nvidia.com/nemo/automodel/performance/performance-summary.md). The machines "
    "and settings are theirs; none of it was measured here."
)
GOALS = {"Qwen3-0.6B": 54000, "Qwen3-1.7B": 33000, "Llama-3.1-8B": 12500}
EQUAL = ("twice", "one process and three", "handovers", "verify --deep", "SIGKILL", "failed recording")
REMARKS = Path(__file__).parents[1] / "REMARKS-GPU.md"
"""What a person says about the figures, kept apart from them: about those of one day, not about later ones."""
RATIOS = ("gap between files", "stall of a commit", "resume", "determinism")


def render(records: Sequence[Record], *, remarks: str = "") -> str:
    """Return the page in Markdown.

    Args:
        remarks: what a person says about these records.
    """
    found = [each for each in records if "subject" in each]
    statuses = [each for each in records if "check" in each]
    parts = (_speed, _layers, _memory, _room, _ratios)
    sections = [_machine(found), _exactness(found, statuses), *(part(found) for part in parts), _statuses(statuses)]
    head = (
        "# Results on a GPU\n\n"
        "Written by `make gpu`. Models have the shapes of public ones and random weights, rows are random tokens.\n"
        "Speed is tokens a second over all timed steps, Onward's with deterministic operations only. Replayed is the\n"
        "share of these steps that came from recordings, kept the memory that recordings take beside the peak of a\n"
        "step. The share of the peak counts 4 operations for each weight and token with LoRA and 6 where all weights\n"
        "are trained, against the vendor's figure for dense bfloat16.\n"
    )
    return "\n".join([head, *sections, remarks if found else ""]).rstrip() + "\n"


def _of(records: Iterable[Record], *subjects: str) -> list[Record]:
    return [each for each in records if each["subject"] in subjects]


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> str:
    if not rows:
        return f"## {title}\n\nNot run.\n"
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join([f"## {title}", "", *lines, *(["", note] if note else []), ""])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _machine(found: Sequence[Record]) -> str:
    machines = _of(found, "machine")
    if not machines:
        return (
            "The machine was not described.\n" if found else "Nothing was run on a GPU yet: no figure below was seen.\n"
        )
    each = machines[-1]
    versions = ", ".join(f"{name} {version}" for name, version in each["versions"].items())
    day = f"{each['date']}: " if "date" in each else ""
    return (
        f"{day}{each['device']}, CUDA {each['cuda']}, Python {each['python']}, {versions}.\n"
        f"A product of two bfloat16 matrices ran at {each['product'] / 1e12:.3g} TFLOP/s, a copy on the device at "
        f"{each['copy'] / 1e12:.3g} TB/s (bytes read and written).\n"
    )


def not_equal(records: Sequence[Record]) -> list[str]:
    """Return the exactness checks whose bits differ, or that began and did not end."""
    differing = [each["subject"] for each in records if each.get("subject") in EQUAL and not each["equal"]]
    return [*differing, *(each["check"] for each in _unseen(records))]


def _unseen(statuses: Iterable[Record]) -> list[Record]:
    """Return the exactness checks that began and did not end."""
    exact = [each for each in statuses if each.get("exact")]
    return [each for each in exact if each["status"] != "done" and not each["status"].startswith("not run")]


def _exactness(found: Sequence[Record], statuses: Sequence[Record]) -> str:
    rows: list[Sequence[object]] = []
    for each in _of(found, *EQUAL):
        detail = each.get("instant") or " ".join(filter(None, (each.get("method"), each.get("dtype"))))
        said = each.get("said") or (f"{each['replays']} parts of steps replayed" if each.get("replays") else None)
        rows.append((each["subject"], detail or None, "==" if each["equal"] else "**differs**", said))
    rows += [(each["check"], None, "**not seen**", each["status"]) for each in _unseen(statuses)]
    return _table("Exactness", ("check", "of", "bits", "said"), rows)


def _speed(found: Sequence[Record]) -> str:
    rows: list[Sequence[object]] = []
    for each in _of(found, "speed"):
        goal = GOALS.get(each["shape"]) if each["side"] == "onward lora" and each["kind"] == "packed" else None
        rows.append(
            (
                each["shape"], each["kind"], each["side"], each["tokens_per_second"], each["share_of_peak"],
                _gigabytes(each["peak_memory"]), each.get("replayed"), _gigabytes(each.get("kept")), goal,
            )
        )  # fmt: skip
    columns = ("shape", "rows", "side", "tokens/s", "share of peak", "peak GB", "replayed", "kept GB", "goal")
    published = _table("Published by others", ("shape", "who", "tokens/s"), PUBLISHED, SOURCES)
    return "\n".join([_table("Speed", columns, rows), _against(found), published])


def _against(found: Sequence[Record]) -> str:
    """Say how many times faster Onward is than each peer on the same rows."""
    rates = {(each["shape"], each["kind"], each["side"]): each["tokens_per_second"] for each in _of(found, "speed")}
    rows = [
        (shape, kind, side, rates[shape, kind, "onward lora"] / rate)
        for (shape, kind, side), rate in rates.items()
        if not side.startswith("onward") and (shape, kind, "onward lora") in rates
    ]
    return _table("Against peers in the same run", ("shape", "rows", "peer", "Onward is times as fast"), rows)


def _layers(found: Sequence[Record]) -> str:
    rows: list[Sequence[object]] = []
    for each in _of(found, "layers"):
        if "failed" in each:
            rows.append((each["shape"], each["way"], None, None, None, f"failed: {each['failed']}"))
            continue
        bits = "==" if each["equal"] else "**differs**"
        speed, start = each["tokens_per_second"], each["start"]
        rows.append((each["shape"], each["way"], speed, _gigabytes(each["peak"]), start, bits))
    columns = ("shape", "way", "tokens/s", "peak GB", "seconds to begin", "bits of two processes")
    note = (
        "kernels is what Onward does: its own for norm, rotation and SwiGLU. eager is plain transformers, norms and "
        "layers are compiled for any number of tokens, liger has its kernels for the same parts. Mixed rows, LoRA."
    )
    return _table("Ways to compute a layer", columns, rows, note)


def _memory(found: Sequence[Record]) -> str:
    rows = [
        (
            each["shape"], each["kind"], each["method"], _gigabytes(each["estimate"]), _gigabytes(each["measured"]),
            each["off"], each["off"] <= each["goal"],
        )
        for each in _of(found, "memory")
    ]  # fmt: skip
    columns = ("shape", "rows", "method", "estimated GB", "measured GB", "off by", "within 0.15")
    return _table("Memory at the peak of a step", columns, rows)


def _room(found: Sequence[Record]) -> str:
    rows = [
        (
            each["shape"], each["method"], each.get("optimizer"), each["gibibytes"], each["fits"],
            _gigabytes(each.get("peak")), each.get("tokens_per_second"), each.get("part_tokens"),
        )
        for each in _of(found, "fits")
    ]  # fmt: skip
    columns = ("shape", "method", "optimizer", "GiB", "fits", "reserved GB", "tokens/s", "tokens of a part")
    note = "The process may allocate no more than such a card leaves it. Rows of 2,048 tokens, 8 a step."
    return _table("On a smaller card", columns, rows, note)


def _ratios(found: Sequence[Record]) -> str:
    rows: list[Sequence[object]] = []
    for each in _of(found, *RATIOS):
        if "not_run" in each:
            rows.append((each["subject"], None, f"not run: {each['not_run']}", None, None))
            continue
        value = each.get("ratio", each.get("steps", each.get("cost")))
        rows.append((each["subject"], each["shape"], value, each["goal"], each["met"]))
    note = (
        "The gap is in steps. A commit is held against a plain copy of as many bytes, a resume against a cold start. "
        "The cost of determinism is a share of a step: steps with it and without, in turn."
    )
    return _table("Beside the steps", ("what", "shape", "measured", "at most", "met"), rows, note)


def _statuses(statuses: Sequence[Record]) -> str:
    rows = [(each["check"], each["status"], each["seconds"]) for each in statuses]
    return _table("Every check", ("check", "what became of it", "seconds"), rows)


def _gigabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e9
