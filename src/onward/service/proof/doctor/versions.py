"""Which libraries are installed: whether Onward was made for them, was tested with them, and last trained with them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping

import peft
import torch
import transformers

from onward.layout import RunLayout
from onward.service.proof.doctor.finding import Finding
from onward.stated import read_manifest
from onward.store.ledger import Ledger

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
}
"""The releases in constraints.txt, which an installed Onward does not have."""
COMPUTING = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
"""The releases on which bits may depend, as a checkpoint records them."""


def check_versions() -> Iterator[Finding]:
    """Name the libraries that decide most, those of which another release is tested, and what is out of range."""
    installed = {name: importlib.metadata.version(name) for name in TESTED}
    words = [f"{name} {version}{_tested(name, version)}" for name, version in installed.items()]
    yield Finding("ok", "versions", ", ".join(words))
    try:
        required = importlib.metadata.requires("onward") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return
    outside = out_of_range(required)
    if outside:
        what = ", ".join(f"{found} (Onward needs {range_})" for found, range_ in outside.items())
        hint = f"pip install {' '.join(repr(range_) for range_ in outside.values())}"
        yield Finding("warning", "versions", what, hint)


def out_of_range(required: Iterable[str]) -> dict[str, str]:
    """Return which installed packages are outside the ranges of a package's requirements; extras are left out.

    Args:
        required: as `importlib.metadata.requires` returns them.
    """
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found[f"{requirement.name} is missing"] = f"{requirement.name}{requirement.specifier}"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found[f"{requirement.name} {version}"] = f"{requirement.name}{requirement.specifier}"
    return found


def check_last_versions(layout: RunLayout) -> Iterator[Finding]:
    """Warn if the newest checkpoint was made with other releases of what computes."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        stated = read_manifest(layout.checkpoint(ledger.committed_step()))
    recorded = (stated or {}).get("environment")
    if not isinstance(recorded, Mapping):
        return
    made = {name: recorded.get(name) for name in COMPUTING}
    other = [f"{name} {made[name]} (here {here})" for name, here in COMPUTING.items() if made[name] not in (None, here)]
    if other:
        hint = "Training goes on from the same weights and moments; from there on other bits are possible, and verify "
        hint += "--deep proves what was trained before only with the releases that trained it"
        yield Finding("warning", "versions", f"the newest state was made with {', '.join(other)}", hint)


def _tested(name: str, version: str) -> str:
    return "" if version.partition("+")[0] == TESTED[name] else f" (tested: {TESTED[name]})"
