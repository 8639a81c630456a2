"""Formats of training files, by the ending of a file's name."""

from __future__ import annotations

from pathlib import Path

from onward.data.files.faults import FileError
from onward.text import printable, quoted

TEXT_FORMATS = ("jsonl", "ndjson", "json", "txt", "csv", "tsv")
"""Formats that are read from the first byte to the last, so they may be compressed or in an archive."""
TABLE_FORMATS = ("parquet", "arrow")
COMPRESSIONS = ("gz", "zst", "xz", "bz2")
ARCHIVE = "zip"
ENDINGS = tuple(f".{name}" for name in (*TEXT_FORMATS, *TABLE_FORMATS))
SEEKS = ("parquet", ARCHIVE)
"""Formats whose bytes are not read in order."""
PACKED = tuple(f".{name}" for name in (*COMPRESSIONS, *TABLE_FORMATS, ARCHIVE))
"""Endings of files that may unpack to any size, however small the files are."""


def file_format(path: Path | str) -> str:
    """Return the format that the name's ending stands for, for example "jsonl", "json.gz", "parquet" or "zip".

    Raises:
        FileError: Onward does not read files with this ending.
    """
    form = format_of(str(path))
    if form is not None:
        return form
    name = Path(path).name
    packed = next((ending for ending in COMPRESSIONS if name.lower().endswith(f".{ending}")), None)
    if packed is None:
        ways = f"{', '.join(ENDINGS)}, the text formats also with {listed(COMPRESSIONS)}, or one of them in a .zip"
        remedy = f"rename or convert it: {ways}"
    elif Path(name).stem.lower().endswith(".tar"):
        remedy = f"unpack it, then add its files: tar xf {quoted(Path(name))}"
    elif format_of(Path(name).stem) is not None:
        remedy = f"unpack it first: .{packed} works only with the text formats"
    else:
        remedy = f"name its content: mv {quoted(Path(name))} {quoted(Path(f'{Path(name).stem}.jsonl.{packed}'))}"
    raise FileError(f"the ending of {printable(name)} is not one that Onward reads", remedy)


def format_of(name: str) -> str | None:
    """Return the format that a name's ending stands for; None where Onward does not read it."""
    endings = [suffix[1:].lower() for suffix in Path(name).suffixes]
    if not endings:
        return None
    if endings[-1] in COMPRESSIONS and len(endings) > 1 and endings[-2] in TEXT_FORMATS:
        return f"{endings[-2]}.{endings[-1]}"
    return endings[-1] if endings[-1] in (*TEXT_FORMATS, *TABLE_FORMATS, ARCHIVE) else None


def unit_of(form: str) -> str:
    """Return the unit in which a place in a file of this format is counted: "line" or "row"."""
    return "row" if form.partition(".")[0] in ("json", *TABLE_FORMATS, ARCHIVE) else "line"


def listed(names: tuple[str, ...]) -> str:
    """Return endings as a list in words."""
    *first, last = [f".{name}" for name in names]
    return f"{', '.join(first)} or {last}" if first else last
