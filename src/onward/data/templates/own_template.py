"""A chat template of the run's own: a file, or one of TRL's templates for training.

Training templates write every message where inference puts it and mark what the model produces, so that rows whose
messages the model's own template drops or moves can be proven. They are read as files from an installed TRL, whose code
is not imported. A run keeps a copy, and from then on depends neither on the file nor on TRL.
"""

from __future__ import annotations

import difflib
import re
from importlib.util import find_spec
from pathlib import Path

from onward.atomic import replace_files
from onward.data.templates.rendering import Renderer
from onward.errors import ConfigError, ModelError
from onward.layout import typed_path
from onward.text import quoted

KEY = "chat_template"
ENDING = ".jinja"
SHIPPED = "_training"
"""The ending of the names of TRL's templates for training; its others are the models' own."""
MISSING = "Name a .jinja file that exists. A run that has trained also has its template in current_model/."
_NAME = re.compile(r"\w+", re.ASCII)


def find_template(value: str, root: Path, *others: Path) -> tuple[str, str]:
    """Return the chat template that a config names: the name of a run's copy of it, and its text.

    Args:
        value: a file, absolute or relative to one of the folders, or the name of a template that TRL ships.
        root: the run's directory.
        others: further folders in which a relative path is looked up.

    Raises:
        ConfigError: there is no such template, or the file is not one.
    """
    copy = root / f"{Path(value).stem}{ENDING}"  # the file, or TRL, may be gone by now
    found = (folder / typed_path(value) for folder in (root, *others))
    path = next((path for path in (*found, copy) if path.is_file()), None)
    if path is not None:
        return _name_in(root, path), _checked(_read(path), path)
    if _NAME.fullmatch(value):
        shipped = _shipped(value)
        return shipped.name, _checked(_read(shipped), shipped)
    raise ConfigError("there is no such chat template", where=f"{KEY}: {value}", hint=MISSING)


def read_template(value: str | None, root: Path) -> str | None:
    """Return the text of the template that the config of the run in `root` names; None if it names none.

    Raises:
        ConfigError: there is no such template, or the file is not one.
    """
    return None if value is None else find_template(value, root)[1]


def keep_template(value: str | None, root: Path) -> tuple[str | None, str]:
    """Return the config value for a template that the user named, in a new run in `root`, and the template's text.

    Nothing is written yet; `template_files` is the copy. A relative path may be meant from the current directory.

    Raises:
        ConfigError: there is no such template, it is not one, or another file has the name that the copy would get.
    """
    if value is None:
        return None, ""
    name, text = find_template(value, root, Path())
    copy = root / name
    if copy.exists() and (not copy.is_file() or _read(copy) != text):
        raise ConfigError(
            "the run would keep its chat template under this name, but another file has it", where=copy,
            hint="Rename one of the two.",
        )  # fmt: skip
    return name, text


def template_files(value: str | None, text: str, root: Path) -> dict[Path, bytes]:
    """Return the run's copy of the template that `keep_template` returned, by path; nothing if it is there."""
    return {} if value is None or (root / value).exists() else {root / value: text.encode()}


def write_template(value: str | None, text: str, root: Path) -> None:
    """Write a run's copy of the template, unless it is there."""
    replace_files(template_files(value, text, root))


def training_twin(template: str) -> tuple[str, str] | None:
    """Return name and text of the template for training that the installed TRL ships for a model's own.

    TRL keeps models' own templates next to those for training; which model this is follows from the text.
    """
    folder = _trl_folder()
    if not template or folder is None:
        return None
    for path in sorted(folder.glob(f"*{SHIPPED}{ENDING}")):
        own = path.with_name(f"{path.stem.removesuffix(SHIPPED)}{ENDING}")
        if own.is_file() and own.read_text(encoding="utf-8") == template:
            return path.stem, path.read_text(encoding="utf-8")
    return None


def has_templates() -> bool:
    """Return whether TRL, which ships templates, is installed."""
    return _trl_folder() is not None


def _name_in(root: Path, path: Path) -> str:
    """Return the path of a file below a run's directory, or the name of the copy that it gets there."""
    here, found = root.resolve(), path.resolve()
    return found.relative_to(here).as_posix() if found.is_relative_to(here) else f"{path.stem}{ENDING}"


def _shipped(name: str) -> Path:
    """Return a template for training that the installed TRL ships."""
    where, folder = f"{KEY}: {name}", _trl_folder()
    if folder is None:
        hint = f"pip install 'onward[templates]', or bring the file: --set {KEY}=PATH/{name}{ENDING}"
        raise ConfigError(
            "there is no such file, and TRL, which ships templates, is not installed", where=where, hint=hint
        )
    names = sorted(path.stem for path in folder.glob(f"*{SHIPPED}{ENDING}"))
    if name in names:
        return folder / f"{name}{ENDING}"
    close = [f"{name}{SHIPPED}"] if f"{name}{SHIPPED}" in names else difflib.get_close_matches(name, names, n=3)
    nearest = f"Did you mean {' or '.join(close)}? " if close else ""
    hint = f"{nearest}The installed TRL has {', '.join(names) or 'none'}; a file is named by its path."
    raise ConfigError("there is no such file, and no training template of that name", where=where, hint=hint)


def _trl_folder() -> Path | None:
    """Return where the installed TRL keeps its chat templates; it is not imported."""
    spec = find_spec("trl")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / "chat_templates" if places else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # ends of lines become "\n", as transformers reads templates
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template cannot be read: {error}", where=path) from None


def _checked(text: str, path: Path) -> str:
    if not text.strip():
        raise ConfigError("the chat template is empty", where=path, hint="Write the template's text into it.")
    try:
        Renderer(text, {})
    except ModelError as error:
        raise ConfigError(error.what, where=path, hint=f"Fix it: {quoted(path)}") from None
    return text
