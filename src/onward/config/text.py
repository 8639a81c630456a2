"""The config as text: `onward.yaml`, `config.json` and `--set`; a refusal names the nearest valid key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from onward.config.config import Config, known_keys
from onward.config.elsewhere import HERE
from onward.config.keys import IDENTITY_KEYS, NEAR_SECRETS, SECTIONS
from onward.errors import ConfigError, Unreadable

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's safe loader where PyYAML has it: ten times faster, and the config is read at every boundary."""

KEYS_HINT = "docs/config.md lists every key with its values; the onward.yaml of a run explains them, too."
MISSING_HINT = (
    "Put it back; the values last used for training are in current_model/checkpoint-*/onward.json, under config."
)
BROKEN_HINT = "Fix it, or put back the values in current_model/checkpoint-*/onward.json, under config."


def parse_config(values: Mapping[str, Any], *, where: object = None) -> Config:
    """Validate nested or dotted values.

    Raises:
        ConfigError: unknown keys, wrong types or impossible values. Unknown keys come with the nearest valid name,
            those of other tools with what they are here.
    """
    if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a config is a mapping of keys to values, not {values!r}", where=where)
    try:
        return Config.model_validate(_nested(values, where))
    except ValidationError as error:
        lines = [_describe(problem) for problem in error.errors(include_url=False)]
        raise ConfigError("; ".join(lines), where=where, hint=KEYS_HINT) from None


def read_config(path: Path) -> Config:
    """Read `onward.yaml` or `config.json`.

    Raises:
        ConfigError: the file is missing or refused.
        Unreadable: the machine cannot read it now.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, _LOADER)
    except FileNotFoundError:
        raise ConfigError("the config is missing", where=path, hint=MISSING_HINT) from None
    except (IsADirectoryError, yaml.YAMLError, ValueError, RecursionError) as error:  # too long or too deep, too
        reason = " ".join(str(error).split()).replace('in "<unicode string>", line', "in line")
        raise ConfigError(f"the config cannot be read: {reason}", where=path, hint=BROKEN_HINT) from None
    except OSError as error:
        raise Unreadable.of(error, path) from None
    if values is None:
        raise ConfigError("the config is empty", where=path, hint=MISSING_HINT)
    return parse_config(values, where=path)


def parse_settings(settings: Iterable[str], where: str = "--set") -> dict[str, Any]:
    """Turn `KEY=VALUE` words into a flat mapping; values are read as YAML.

    Args:
        where: the option or argument that they were given with.

    Raises:
        ConfigError: a word without `=`, an unknown key, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            hint = f"For instance: {'--set lora.rank' if where == '--set' else 'batch_size'}=8"
            raise ConfigError(f"{setting!r} is not KEY=VALUE", where=where, hint=hint)
        try:
            values[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            hint = "Values are YAML: a number, a word, or a list such as [q_proj, v_proj]."
            raise ConfigError(f"the value of {key} cannot be read: {text!r}", where=where, hint=hint) from None
    _nested(values, where)
    return values


def render_yaml(config: Config) -> str:
    """Return the text of `onward.yaml`: every key, its value and what it means."""
    lines = ["# Config of this run. Locked once it has trained: " + ", ".join(IDENTITY_KEYS) + "."]
    lines.append(
        "# The others take effect at the next file, start or step, as docs/config.md says; the ledger records it."
    )
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            lines.append(f"{name}:")
            for key, inner in type(value).model_fields.items():
                lines.append(f"  {key}: {_scalar(getattr(value, key))}  # {inner.description}")
        else:
            lines.append(f"{name}: {_scalar(value)}  # {field.description}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    text = json.dumps(list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value, ensure_ascii=False)
    has_no_point = isinstance(value, float) and "." not in text
    return text.replace("e", ".0e") if has_no_point else text  # 1e-08 is a number only in YAML 1.2


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the keys of sections written with a dot, however they are given."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if key in SECTIONS and isinstance(value, Mapping) else None
        flat.update({key: value} if inner is None else {f"{key}.{name}": each for name, each in inner.items()})
    return flat


def _nested(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Nest dotted keys and refuse unknown ones, each with what it is here or the nearest valid name."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, rest = str(key).partition(".")
        if dot:
            inner = result.setdefault(section, {})
            if isinstance(inner, dict):
                inner[rest] = value
        elif isinstance(value, Mapping) and isinstance(result.get(section), dict):
            result[section].update(value)
        else:
            result[section] = {str(k): v for k, v in cast(Any, value).items()} if isinstance(value, Mapping) else value
    sections = {name: result[name] for name in SECTIONS if isinstance(result.get(name), dict)}
    names = [key for key in result if key not in SECTIONS]
    names += [f"{name}.{key}" for name, section in sections.items() for key in section]
    known = set(known_keys())
    unknown = [f"unknown key {name!r}{_meant(name)}" for name in names if name not in known]
    if unknown:  # values are not shown: one may be a misspelt secret
        raise ConfigError("; ".join(unknown), where=where, hint=KEYS_HINT)
    return result


def _meant(name: str) -> str:
    if name in HERE:
        return f", which here is {HERE[name]}"
    keys = known_keys()
    close = [key for key in keys if key.endswith("." + name.rpartition(".")[2])]
    close = close or difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _as_typed(value: Any) -> str:
    """Return a value as YAML has it where Python writes it another way."""
    return _scalar(value) if value is None or isinstance(value, bool) else repr(value)


_KINDS = ("function-", "list[", "literal[", "str")
"""How parts of a problem's place begin that name no key, but one of the kinds of values that it takes."""


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(_KINDS))
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    value = problem["input"]
    near = ""
    if problem["type"] == "literal_error" and isinstance(value, str):
        allowed = [word.strip("'") for word in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        close = difflib.get_close_matches(value, allowed, n=1)
        near = f" (did you mean {close[0]!r}?)" if close else ""
    if problem["type"] == "model_type":
        first = next(name for name in known_keys() if name.startswith(f"{key}."))
        message = f"it is a section, whose keys are written with a dot, such as {first}"
    message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping of names to values")
    shown = "its value" if key.partition(".")[0] in NEAR_SECRETS else _as_typed(value)
    return f"{key}: {shown} is refused: {message[:1].lower()}{message[1:]}{near}"
