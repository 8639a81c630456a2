"""Data sets of the Hugging Face Hub by name: `hf://datasets/OWNER/NAME[@REVISION][/PATH]`.

A data set is downloaded only if the user names it, into the cache of `huggingface_hub`; from there its files are copied
and hashed like any others.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.data.files.formats import format_of
from onward.errors import UsageError, said_by_hub
from onward.text import printable, quoted

SCHEME = "hf:"
_TRAIN = re.compile(r"(^|[/_.-])train(ing)?([/_.-]|$)")
_SHOWN = 5
REFS = (["convert"], ["pr"])
"""What follows `refs/` in revisions of which the Hub's own names have the slashes: `@refs/convert/parquet/FILE`."""
LOOK = 0.2
"""Seconds between two checks of whether to end a download."""


def is_hub_name(path: Path) -> bool:
    """Return whether a path is the name of a data set, even if it was made absolute."""
    return SCHEME in path.parts


@dataclass(frozen=True)
class HubName:
    """The name of a data set, or of some of its files; a path may have `*` in it."""

    repository: str
    revision: str | None
    path: str

    @classmethod
    def of(cls, path: Path) -> HubName:
        """Parse a name.

        Raises:
            UsageError: it does not name a data set.
        """
        kind, *rest = [*path.parts[path.parts.index(SCHEME) + 1 :], ""]
        parts = [part for part in rest if part]
        if kind != "datasets" or len(parts) < 2:
            hint = "Name it as hf://datasets/OWNER/NAME, with /FILE after it for one of its files."
            where = printable(f"hf://{'/'.join([kind, *parts])}")  # a path has one slash where the name has two
            raise UsageError("this is not the name of a data set on the Hub", where=where, hint=hint)
        owner, named, *inner = parts
        name, _, revision = named.partition("@")
        if revision == "refs" and inner[:1] in REFS and len(inner) > 1:
            revision, inner = "/".join([revision, *inner[:2]]), inner[2:]
        return cls(f"{owner}/{name}", revision.replace("%2F", "/") or None, "/".join(inner))

    def __str__(self) -> str:
        revision = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"hf://datasets/{self.repository}{revision}{'/' if self.path else ''}{self.path}"


class Hub:
    """Downloads data sets.

    Args:
        api: a `huggingface_hub.HfApi`; by default one with the settings of the environment.
    """

    def __init__(self, api: Any = None) -> None:
        self._api = api

    def fetch(self, path: Path, stop: Callable[[], None] = lambda: None) -> list[Path]:
        """Download a data set and return its files; of one with splits, those for training.

        Args:
            stop: called every now and then; may raise. The next call continues the download.

        Raises:
            UsageError: there is no such data set, it cannot be fetched now, or it is unclear which of its files are
                meant.
        """
        name = HubName.of(path)
        found: Future[list[Path]] = Future()

        def work() -> None:
            try:
                found.set_result(self._download(name))
            except BaseException as error:  # raised by the thread that waits
                found.set_exception(error)

        threading.Thread(target=work, name="onward-hub", daemon=True).start()
        while not wait([found], LOOK).done:
            stop()
        return found.result()

    def files(self, paths: Sequence[Path], stop: Callable[[], None] = lambda: None) -> list[Path]:
        """Return paths with each name of a data set replaced by its files; raises as `fetch` does."""
        return [file for path in paths for file in (self.fetch(path, stop) if is_hub_name(path) else [path])]

    def _download(self, name: HubName) -> list[Path]:
        try:
            api = self._api or _api()
            info = api.dataset_info(name.repository, revision=name.revision)
            files = _chosen(name, [file.rfilename for file in info.siblings or []])
            return [
                Path(api.hf_hub_download(name.repository, file, repo_type="dataset", revision=info.sha))
                for file in files
            ]
        except UsageError:
            raise
        except Exception as error:  # from the network, its libraries, or the Hub
            raise UsageError(
                f"the data set {name.repository} cannot be fetched: {said_by_hub(error)[0]}",
                where=str(name),
                hint="Check the name and the network; if it needs a login: hf auth login. Nothing was added.",
            ) from None


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _chosen(name: HubName, files: list[str]) -> list[str]:
    readable = sorted(file for file in files if format_of(file) is not None and not file.startswith("."))
    if name.path:
        below = name.path.rstrip("/") + "/"
        pattern = re.compile(".*".join(map(re.escape, name.path.split("*"))))  # of all signs, only * is one
        inside = [file for file in readable if file.startswith(below)]
        training = [file for file in inside if _TRAIN.search(file.removeprefix(below))]
        asked = training or inside or [file for file in readable if pattern.fullmatch(file)]
        if not asked:
            raise _refusal(name, "there is no such file that Onward reads", readable)
        return asked
    chosen = readable if len(readable) == 1 else [file for file in readable if _TRAIN.search(file)]
    if not chosen:
        raise _refusal(name, "it is not clear which of its files are meant", readable)
    if len({(file.rpartition("/")[0], format_of(file)) for file in chosen}) > 1:
        raise _refusal(name, "it has files for training in several folders or formats", chosen)
    return chosen


def _refusal(name: HubName, reason: str, files: list[str]) -> UsageError:
    whole = HubName(name.repository, name.revision, "")
    shown = ", ".join(map(printable, files[:_SHOWN])) + (", ..." if len(files) > _SHOWN else "")
    first = quoted(Path(f"{files[0]}")) if files else "FILE"
    hint = f"It has {shown}. Name the one you want: {whole}/{first}" if files else "It has no file that Onward reads."
    return UsageError(f"{reason}: {whole}", where=str(name), hint=hint)
