"""The page of `bench/knowledge.py`: a table of policies, what was published, and remarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).parent
PAGE, REMARKS = HERE / "KNOWLEDGE.md", HERE / "KNOWLEDGE-REMARKS.md"
JOINT = "all at once"
PUBLISHED = (
    "Scialom et al. 2022: 1 % of replay nearly keeps eight tasks.",
    "Ibrahim et al. 2024: 1 to 5 % for a weak shift of the data, up to 50 % for a strong one.",
    "arXiv:2605.26097: KL on text of the model itself keeps more than KL on raw text of the web.",
    "arXiv:2605.29495: 1 % of on-policy text moves backward transfer from -13.9 to -2.3.",
)
COLUMNS = ("policy", "trainings", "loss", "against all at once", "forgetting", "worst", "KL from the base",
           "extra tokens")  # fmt: skip
ABOUT = """\
Five domains one after another. Loss: mean over the held-out rows of all five at the end, in nats. Forgetting: the loss
at the end by the best loss since the domain was trained, less 1, over all domains but the last. KL: on texts that the
base wrote and that nothing trained on, in nats a token. Extra tokens: against `nothing`, the anchor's texts counted.
Released: with a cooldown of a tenth of the steps (`onward release`), held against all at once without one.
"""
Found = Mapping[str, Any]


def write(found: Mapping[str, Found], policies: Iterable[str], about: Mapping[str, Any]) -> None:
    """Write `KNOWLEDGE.md` from what was measured."""
    PAGE.write_text(render(list(found.values()), policies, about), encoding="utf-8")


def render(found: Sequence[Found], policies: Iterable[str], about: Mapping[str, Any]) -> str:
    """Return `KNOWLEDGE.md`.

    Args:
        found: a record per training.
        policies: all policies, in the order of the table.
    """
    machine = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = ["# What the model keeps", "", f"Written by `make knowledge`. {machine}.", ""]
    lines += [ABOUT]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    groups: dict[str, list[Found]] = {}
    for each in found:
        groups.setdefault(each["policy"], []).append(each)
        if "released" in each:
            groups.setdefault(f"{each['policy']}, released", []).append({**each, **each["released"]})
    joint = fmean(each["average"] for each in groups[JOINT]) if JOINT in groups else None
    orders = {tuple(each["order"]): each["tokens"] for each in groups.get("nothing", ())}
    for policy in (JOINT, *policies):
        lines += [_row(policy, groups[policy], joint, orders)] if policy in groups else [_blank(policy)]
        if (name := f"{policy}, released") in groups:
            lines.append(_row(name, groups[name], joint, orders))
    lines += ["", *_by_domain(groups), "", "Published beside it:", "", *(f"- {text}" for text in PUBLISHED), ""]
    if REMARKS.is_file():
        lines += [REMARKS.read_text(encoding="utf-8").strip(), ""]
    return "\n".join(lines)


def _row(policy: str, trained: Sequence[Found], joint: float | None, plain: Mapping[tuple[str, ...], int]) -> str:
    against = f"{fmean(each['average'] for each in trained) / joint - 1:+.1%}" if joint else ""
    more = [each["tokens"] / plain[order] - 1 for each in trained if (order := tuple(each["order"])) in plain]
    cells = [_mean(trained, name) for name in ("average", "forgetting", "worst", "kl")]
    extra = f"{fmean(more):+.1%}" if more else ""
    return f"| {policy} | {len(trained)} | {cells[0]} | {against} | {cells[1]} | {cells[2]} | {cells[3]} | {extra} |"


def _blank(policy: str) -> str:
    return f"| {policy} | not run" + " |" * (len(COLUMNS) - 1)


def _mean(trained: Sequence[Found], name: str) -> str:
    values = [each[name] for each in trained if each[name] is not None]
    if not values:
        return ""
    form = "{:.1%}" if name in ("forgetting", "worst") else "{:.4f}"
    apart = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return form.format(fmean(values)) + apart


def _by_domain(groups: Mapping[str, Sequence[Found]]) -> list[str]:
    """Return the losses at the end by domain, of the first training of each policy."""
    first = {policy: trained[0] for policy, trained in groups.items()}
    if not first:
        return []
    names = next(iter(first.values()))["order"]
    lines = ["Loss at the end by domain, of the first training of each, in the order in which they came:", ""]
    lines += [f"| policy | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    base = next((each["base"] for each in first.values() if all(each["base"].values())), None)
    if base is not None:
        lines.append(_losses("the base", [base[name] for name in names]))
    return lines + [_losses(policy, [each["losses"][name] for name in names]) for policy, each in first.items()]


def _losses(policy: str, losses: Sequence[float]) -> str:
    return f"| {policy} | {' | '.join(f'{loss:.3f}' for loss in losses)} |"
