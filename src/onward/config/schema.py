"""The config's JSON schema, for editors: it is written next to `onward.yaml`, whose first line names it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, cast

from onward.config.config import Config
from onward.config.keys import SECTIONS
from onward.config.text import render_yaml

SCHEMA = "onward.schema.json"
MODELINE = f"# yaml-language-server: $schema={SCHEMA}"
"""What the YAML language server looks for; it takes the path from the folder of the file."""

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
"""Bounds as pydantic names them after a custom check, and as JSON Schema names them."""


def config_schema() -> dict[str, Any]:
    """Return the schema of `onward.yaml` (JSON Schema, draft 2020-12); it knows keys of sections in dotted form too."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    for name in SECTIONS:
        section: Any = Config.model_fields[name].annotation
        inner = definitions[section.__name__]["properties"]
        schema["properties"] |= {f"{name}.{key}": value for key, value in inner.items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_standard(schema), "title": "onward.yaml"}


def _standard(schema: Any) -> Any:
    """Return a schema whose bounds have the names of JSON Schema."""
    if isinstance(schema, list):
        return [_standard(value) for value in cast(list[Any], schema)]
    if not isinstance(schema, dict):
        return schema
    values = cast(dict[str, Any], schema)
    return {
        _BOUNDS.get(key, key) if isinstance(value, int | float) else key: _standard(value)
        for key, value in values.items()
    }


@functools.cache  # a constant, which takes longer to make than all else that `init` writes
def schema_text() -> str:
    """Return the schema as the text of its file."""
    return json.dumps(config_schema(), indent=2) + "\n"


def config_files(path: Path, config: Config) -> dict[Path, bytes]:
    """Return the files of a new run's config, by path: `onward.yaml`, and its schema next to it."""
    return {
        path.with_name(SCHEMA): schema_text().encode(),
        path: f"{MODELINE}\n{render_yaml(config)}".encode(),
    }
