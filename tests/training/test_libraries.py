"""Which libraries of others the record of an environment names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from onward.config import Config
from onward.training.model.libraries import library_facts


def base(folder: Path, **values: object) -> Path:
    """Return the folder of a base with a config of these values."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def install(site: Path, package: str, name: str, version: str) -> None:
    """Make an empty package that is installed under a name."""
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").touch()
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    importlib.invalidate_caches()


def test_a_library_counts_for_the_models_whose_code_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is installed is in the record of each such model, its own or its text model's, and of no other."""
    site, config = tmp_path / "site", Config()
    folder = base(tmp_path / "base", model_type="qwen3_5", text_config={"model_type": "qwen3_5_text"})
    others = [base(tmp_path / kind, model_type=kind) for kind in ("llama", "unheard of", "../llama")]
    monkeypatch.syspath_prepend(str(site))
    seen = [library_facts(folder, config)]
    install(site, "fla", "flash-linear-attention", "9.8")
    install(site, "causal_conv1d", "causal-conv1d", "7.6")
    seen.append(library_facts(folder, config))
    assert [{"libraries": "none"}, {"libraries": "causal-conv1d 7.6, flash-linear-attention 9.8"}] == seen
    assert [{}, {}, {}] == [library_facts(other, config) for other in others]
    (folder / "config.json").write_text("[")
    assert {} == library_facts(folder, config)


@pytest.mark.parametrize("settings", [{"method": "qlora"}, {"optimizer": "adamw_8bit"}])
def test_the_library_of_four_bits_counts_where_it_computes(settings: dict[str, str], tmp_path: Path) -> None:
    """4-bit layers and 8-bit moments are computed by bitsandbytes."""
    (found,) = library_facts(base(tmp_path / "base", model_type="llama"), Config(**settings)).values()
    assert found == "none" or found.startswith("bitsandbytes ")
