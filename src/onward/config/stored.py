"""The config that a run was trained with, as manifests and the ledger record it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import TypeAdapter, ValidationError

from onward.config.config import Config
from onward.config.keys import SECTIONS
from onward.config.sections import Section


def stored_config(values: Mapping[str, Any]) -> Config:
    """Return a config that a manifest or the ledger recorded.

    What a run was trained with is not judged by what today's keys allow: keys that this release no longer has are left
    out, and values that it would refuse are kept as they are.
    """
    known = {name: values[name] for name in Config.model_fields if name in values}
    for name in SECTIONS:
        if isinstance(known.get(name), Mapping):
            fields = _section(name).model_fields
            known[name] = {key: value for key, value in known[name].items() if key in fields}
    try:
        return Config.model_validate(known)
    except ValidationError:
        return Config.model_construct(**{name: _as_it_is(name, value) for name, value in known.items()})


def _section(name: str) -> type[Section]:
    return cast("type[Section]", Config.model_fields[name].annotation)


def _as_it_is(name: str, value: Any) -> Any:
    """Return one value in the type that its key has today, if it can be converted."""
    field = Config.model_fields[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        return TypeAdapter[Any](kind).validate_python(value)
    except ValidationError:
        return _section(name).model_construct(**value) if name in SECTIONS and isinstance(value, Mapping) else value
