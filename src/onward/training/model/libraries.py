"""Libraries that compute parts of a model where they are installed, for the record of the environment."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import model_type_to_module_name

from onward.config import Config

OF_MODELS = {
    "causal-conv1d": ("causal_conv1d", r"causal_conv1d"),
    "flash-linear-attention": ("fla", r"\bfla\b|flash_linear_attention"),
    "mamba-ssm": ("mamba_ssm", r"mamba_ssm"),
    "mambapy": ("mambapy", r"mambapy"),
    "xlstm": ("xlstm", r"xlstm"),
}
"""Libraries that models of transformers use if they find them: by distribution, the package and how code names it."""

OF_FOUR_BITS = ("bitsandbytes", "bitsandbytes")
"""Distribution and package of what computes 4-bit layers and 8-bit moments."""


def library_facts(base: Path, config: Config) -> dict[str, str]:
    """Return the versions of libraries on which the bits of a model's steps depend; empty if there can be none.

    Args:
        base: folder of the base model.
    """
    code = "".join(_code_of(base))
    wanted = [(name, package) for name, (package, named) in OF_MODELS.items() if re.search(named, code)]
    if config.method == "qlora" or config.optimizer == "adamw_8bit":
        wanted.append(OF_FOUR_BITS)
    found = [f"{name} {_version(name)}" for name, package in sorted(wanted) if _is_installed(package)]
    return {"libraries": ", ".join(found) or "none"} if wanted else {}


def _code_of(base: Path) -> Iterator[str]:
    """Yield the code of transformers that may compute a base model."""
    try:
        config = json.loads((base / "config.json").read_bytes())
        kinds = {str(each.get("model_type")) for each in (config, config.get("text_config") or {})}
    except (OSError, ValueError, AttributeError):  # loading the model will show what is wrong with it
        return
    for kind in sorted(kinds & set(CONFIG_MAPPING)):
        spec = importlib.util.find_spec(f"transformers.models.{model_type_to_module_name(kind)}")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder).glob("modeling_*.py")):
                yield path.read_text(encoding="utf-8")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # something that is no module is known under its name
        return False


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"
