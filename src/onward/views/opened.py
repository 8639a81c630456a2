"""Opens what the user names as the file that `add` would read; a saved data set is joined into one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator
from pathlib import Path

from onward.data.files.faults import FileError
from onward.errors import FileRejected, UsageError
from onward.service.intake.budget import Spending
from onward.service.intake.folders import is_saved_dataset, joined, require_file
from onward.service.intake.hub import Hub, HubName, is_hub_name
from onward.service.intake.names import plain_name
from onward.service.intake.refusals import Refusal


@contextlib.contextmanager
def opened(path: Path, hub: Hub | None = None) -> Generator[Path]:
    """Yield the file that a path means; anything made for it exists only during the body.

    Args:
        path: a file, a folder that `Dataset.save_to_disk` wrote, or the name of a data set of the Hub.
        hub: where data sets come from.

    Raises:
        UsageError: there is no such file, or the data set has several.
        FileRejected: a saved data set cannot be joined.
    """
    path = _downloaded(path, hub or Hub()) if is_hub_name(path) else path
    require_file(path)
    if not is_saved_dataset(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="onward-") as folder:
        file = Path(folder) / plain_name(f"{path.absolute().name}.arrow")
        try:
            with file.open("wb") as writer:
                joined(path, writer, Spending())
        except FileError as error:
            raise rejection(Refusal.of_file(path.name, error)) from None
        yield file


def rejection(refusal: Refusal) -> FileRejected:
    """Return the error for a file that `add` would refuse."""
    lines = "\n".join(f"  {line}" for line in refusal.lines())
    way = f", {refusal.way_out}" if refusal.way_out else ""
    hint = f"Fix the rows and try again{way}."
    return FileRejected(f"the file would be rejected:\n{lines}", where=refusal.name, hint=hint)


def _downloaded(path: Path, hub: Hub) -> Path:
    files = hub.fetch(path)
    if len(files) == 1:
        return files[0]
    name = HubName.of(path)
    whole = HubName(name.repository, name.revision, "")
    hint = f"Name one of them: {whole}/*{files[0].name}"
    raise UsageError(f"this names {len(files)} files", where=str(name), hint=hint)
