"""Base models by their Hugging Face names: the cache may hold a part of one, and moves on to later revisions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stock

from onward import Run
from onward.errors import ModelError
from onward.training.model.base import base_of_run, keep_revision, resolve_base, revision_of

NAME = "org/tiny"
FIRST, NEXT = "a" * 40, "b" * 40
Fetch = Callable[[str], Path]


@pytest.fixture
def fetch(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Return a function that brings a whole revision into an empty cache, as the newest one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--org--tiny"
    (repository / "refs").mkdir(parents=True)

    def bring(revision: str) -> Path:
        (repository / "refs/main").write_text(revision)
        return Path(shutil.copytree(model, repository / "snapshots" / revision))

    return bring


def test_a_run_stays_with_the_revision_that_it_began_with(fetch: Fetch, tmp_path: Path) -> None:
    """The name goes on to mean the run's revision after the cache got a later one; without it, what the cache has."""
    first = fetch(FIRST)
    run = Run.create(tmp_path / "run", NAME, later=True).layout.root
    last = fetch(NEXT)
    assert (first, last) == (base_of_run(run, NAME), resolve_base(NAME))
    keep_revision(run, NAME, first)
    assert (FIRST, None) == (revision_of(first), revision_of(tmp_path))
    (first / "model.safetensors").unlink()
    assert last == base_of_run(run, NAME)
    with pytest.raises(ModelError, match="'org/other' is not in the local cache"):
        base_of_run(run, "org/other")


def test_an_adapters_base_is_the_revision_that_it_names(fetch: Fetch, tmp_path: Path) -> None:
    """An adapter that says on which revision of its base it was trained does not get the newest one."""
    first = fetch(FIRST)
    start = tmp_path / "start"
    stock.lora_model(first).save_pretrained(str(start))
    values: dict[str, Any] = json.loads((start / "adapter_config.json").read_bytes())
    values |= {"base_model_name_or_path": NAME, "revision": FIRST}
    (start / "adapter_config.json").write_text(json.dumps(values))
    fetch(NEXT)
    run = Run.create(tmp_path / "run", adapter=start, later=True)
    assert first == base_of_run(run.layout.root, run.config.model)


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer"])
def test_what_the_cache_lacks_of_a_model_is_downloaded(lost: str, fetch: Fetch, monkeypatch: Any) -> None:
    """Any program leaves single files in the cache; `init` fetches the rest, and whoever may not download says so."""
    folder = fetch(FIRST)
    for path in folder.glob(f"{lost}*"):
        path.rename(folder.parent / path.name)
    asked: list[dict[str, Any]] = []

    def download(name: str, **how: Any) -> str:
        if not how.get("local_files_only"):
            asked.append(how)
            for path in folder.parent.glob(f"{lost}*"):
                path.rename(folder / path.name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if lost == "model.safetensors":
        with pytest.raises(ModelError, match="only in part, without weights") as caught:
            resolve_base(NAME)
        assert f"onward init NEW_RUN --model {NAME}" in str(caught.value.hint)
    said: list[str] = []
    assert folder == resolve_base(NAME, download=True, report=said.append)
    assert ([f"downloading {NAME}"], 1) == (said, len(asked))
    assert folder == resolve_base(NAME, download=True, report=said.append)
    assert 1 == len(asked)


def test_a_model_without_weights_to_download_is_refused(fetch: Fetch, monkeypatch: Any) -> None:
    """A revision without safetensors, or of which no more can be had now, is refused with both ways out; one whose
    download breaks off is refused, too, whatever the network's library raises.
    """
    folder = fetch(FIRST)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors here") as caught:
        resolve_base(NAME, download=True, report=lambda _: None)
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)

    def download(name: str, **how: Any) -> str:
        if not how.get("local_files_only"):
            raise Exception("peer closed connection")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError, match="cannot be downloaded: peer closed") as caught:
        resolve_base(NAME, download=True, report=lambda _: None)
    assert "the network" in str(caught.value.hint)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_gated_model_is_refused_with_what_the_hub_says_of_it(status: int, monkeypatch: Any) -> None:
    """A hub answers alike for what is not there and for what a stranger may not see: the hint has the login."""

    def download(name: str, **how: Any) -> str:
        error = OSError(f"{status} Client Error. (Request ID: 1)\n\nCannot access gated repo for url http://hub.")
        raise_as: Any = error
        raise_as.server_message = "Access to model o/m is restricted.\nLog in."
        raise_as.response = SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words = rf"downloaded: {status} Client Error. \(Request ID: 1\) Access to model o/m is restricted. Log in."
    with pytest.raises(ModelError, match=words) as caught:
        resolve_base(NAME, download=True, report=lambda _: None)
    assert "hf auth login" in str(caught.value.hint)
