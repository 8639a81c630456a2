"""Uploads an export to a hub with huggingface_hub, which finds the token itself; it is neither read nor shown here."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Generator
from http import HTTPStatus
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from onward.errors import OnwardError, UsageError, first_line, said_by_hub
from onward.layout import RunLayout
from onward.text import quoted
from onward.training.model.quiet import quiet
from onward.views.export.export import Wanted, export
from onward.views.points import own_folder

_LOADED = re.compile(r"adapter_config\.json|(adapter_|pytorch_)?model[^/]*\.(safetensors|bin)(\.index\.json)?")
"""Files of a repository that libraries look for by name: weights, and what makes them those of an adapter."""
LOGIN = "Log in with: hf auth login; or set HF_TOKEN to a token that may write."


def push(
    layout: RunLayout,
    repository: str,
    *,
    at: str | None = None,
    file_format: str | None = None,
    private: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Export a state and upload it as one commit; the repository is created if it is missing.

    Args:
        repository: `NAME` or `OWNER/NAME`.
        at, file_format: as for an export.
        private: whether a newly created repository is private.

    Returns:
        What was exported, with `repository` and the `url` of the commit.

    Raises:
        UsageError: the name is not valid for a repository, which may hold another model, or the state cannot be
            exported.
        OnwardError: the hub refuses, or cannot be reached.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="onward")
    with own_folder(layout) as place:
        result = export(layout, Wanted(place / "export", file_format, at), report)
        with _refusals(repository), quiet():
            made = api.create_repo(repository, private=private, exist_ok=True, token=True)
            _require_no_other(made.repo_id, _listed(api, made.repo_id), set(result["files"]))
            commit = api.upload_folder(
                repo_id=made.repo_id, folder_path=place / "export", commit_message=result["at"], token=True
            )
    return {**result, "target": made.repo_id, "repository": made.repo_id, "url": str(commit.commit_url)}


def _listed(api: HfApi, repository: str) -> set[str]:
    """Return the names of the files in a repository; none if the hub knows of none."""
    try:
        return set(api.list_repo_files(repository, token=True))
    except HfHubHTTPError as error:
        if error.response.status_code != HTTPStatus.NOT_FOUND:
            raise
        return set()


def _require_no_other(repository: str, there: set[str], pushed: set[str]) -> None:
    """Refuse a repository with weights of an earlier push under other names: programs load them in place of the new.

    transformers prefers an adapter to a model beside it, and one file of weights to several.

    Raises:
        UsageError: there are such files.
    """
    if not any(_LOADED.fullmatch(name) for name in pushed):  # GGUF is loaded by its name
        return
    others = sorted(name for name in there - pushed if _LOADED.fullmatch(name))
    if others:
        named = " ".join(map(quoted, others))
        raise UsageError(
            f"the repository has another model, which programs would load in place of this one: {', '.join(others)}",
            where=repository,
            hint=f"Name another repository, or remove them first: hf repos delete-files {quoted(repository)} {named}",
        )


@contextlib.contextmanager
def _refusals(repository: str) -> Generator[None]:
    """Turn errors of the hub, or on the way to it, into Onward's own; a token in their text is masked."""
    try:
        yield
    except HFValidationError as error:
        raise UsageError(first_line(error), where="REPO", hint="Name it as OWNER/NAME.") from None
    except LocalTokenNotFoundError:
        raise OnwardError("there is no token for the hub", where=repository, hint=LOGIN) from None
    except OnwardError:
        raise
    except Exception as error:  # from the network, its libraries, or the hub
        what, status = said_by_hub(error)
        if status is None:
            hint = "Check the network, then type the same command again."
            raise OnwardError(f"the upload failed: {what}", where=repository, hint=hint) from None
        hint = LOGIN if status in (401, 403) else None
        raise OnwardError(f"the hub refuses: {what}", where=repository, hint=hint) from None
