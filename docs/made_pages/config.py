"""The page of the config's keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from made_pages.words import NOTE, cell, names, refusal
from onward.config import Config
from onward.config.elsewhere import KEYS_ELSEWHERE
from onward.config.keys import SECTIONS, acts
from onward.config.text import parse_config
from onward.errors import ConfigError

REFUSED_SETTINGS: Sequence[dict[str, Any]] = (
    {"lora.rnak": 8},
    {"batch_size": 0},
    {"batch_size": True},
    {"schedule": "constnat"},
    {"schedule": "cosine"},
    {"schedule": "cosine", "total_steps": 10, "warmup_steps": 10},
    {"min_learning_rate": 1.0},
    {"betas": [0.9, 1.0]},
    {"notify.url": "example.org/hook"},
    {"notify.events": ["finished"]},
)

CONFIG_RULES = """\
The config of a run is `onward.yaml` in its directory or, if there is none, a `config.json` with the same keys.
`onward init` writes every key with its value; a key that is left out has its default. On the command line, write the
keys of a section with a dot: `--set lora.rank=8`. Values of `--set` are read as YAML.
"""

CONFIG_CHANGES = """\
## When a change takes effect

The last column of the table says when a change takes effect in a run that has trained.

- **Never**: identity keys define the run. Once the run has a checkpoint, a change to one is refused with both values;
  put the old value back, or make another run. The only exception is `model`, which may name another place with the same
  weights. The base model, the tokenizer and the chat template are locked too, by their content.
- **At the next file**: a file whose training has begun keeps the config that it began with, even after a stop. The
  ledger records each change with its step. If `max_length`, `over_length`, `columns` or `text.documents` changes,
  waiting files are tokenized again.
- **At the next start**: processes that train together agree on the key when they start.
- **At once**: no weight depends on the key. A running process reads the config again when it changes.

A config that is refused changes nothing in a running process: `onward status` shows why as `problem`, and the next file
waits until the config is fixed.

## Learning rate

`s` is the step about to be taken, counted from 1 over the whole run; `w` is `warmup_steps`, `peak` is `learning_rate`,
`floor` is `min_learning_rate`. The value below is raised to `floor` if it is lower, then multiplied by `min(1, s / w)`.

| schedule | value at step `s` |
|---|---|
| `constant` | `peak` |
| `wsd` | `peak` (warmup, then stable; the decay is the cooldown of `onward release`) |
| `inverse_sqrt` | `peak * sqrt(max(w, 1) / max(s, w, 1))` |
| `linear` | `floor + (peak - floor) * (1 - p)` with `p = max(0, s - w) / (total_steps - w)` |
| `cosine` | `floor + (peak - floor) * (1 + cos(pi * p)) / 2` with the same `p` |

`linear` and `cosine` end at `total_steps`. A file that would go beyond it is refused before its first step. Once a run
has used one of them, its `total_steps` cannot change: a schedule is not stretched.

## Boundary policies

| boundary | weights | moments and Adam's counter | learning rate |
|---|---|---|---|
| `carry` | continue | continue | continues |
| `reset_moments` | continue | start from zero at each file | continues |
| `rewarm` | continue | continue | the warmup counts steps of the file, not of the run |
"""

CONFIG_ELSEWHERE = """\
## Keys of other tools

What a key of transformers' Trainer, TRL, Axolotl, LLaMA-Factory or Unsloth is here, where its name is another one.
`learning_rate`, `weight_decay`, `max_grad_norm`, `warmup_steps`, `save_steps`, `seed`, `use_dora` and `use_rslora` keep
their names, the last two below `lora`. A checkpoint of these tools is [adopted](adopting.md) with its settings.

| there | here |
|---|---|
"""


def config_page() -> str:
    """Return the text of config.md."""
    lines = [NOTE, "", "# Config", "", CONFIG_RULES]
    lines += ["| key | values | default | what it is | a change acts |", "|---|---|---|---|---|"]
    schema = Config.model_json_schema()
    for name, field in Config.model_fields.items():
        if name in SECTIONS:
            section: Any = field.annotation
            inner = schema["$defs"][section.__name__]["properties"]
            lines += [_config_row(f"{name}.{key}", inner[key], section.model_fields[key]) for key in inner]
        else:
            lines.append(_config_row(name, schema["properties"][name], field))
    lines += ["", "Under `method: full` the keys of `lora` have no effect, and may be changed.", "", CONFIG_CHANGES]
    lines += [CONFIG_ELSEWHERE + "\n".join(f"| {names(there)} | {here} |" for there, here in KEYS_ELSEWHERE), ""]
    lines += ["## What is refused", "", "Exit status 2. For instance:", "", "| settings | answer |", "|---|---|"]
    for settings in REFUSED_SETTINGS:
        shown = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in settings.items())
        lines.append(f"| {shown} | {cell(refusal(parse_config, settings, ConfigError).what)} |")
    return "\n".join(lines) + "\n"


def _config_row(key: str, schema: Mapping[str, Any], field: Any) -> str:
    default = json.dumps(field.get_default(call_default_factory=True))
    return f"| `{key}` | {_values(schema)} | `{default}` | {cell(field.description)} | {acts(key)} |"


def _values(schema: Mapping[str, Any]) -> str:
    """Describe in words what values a JSON schema admits."""
    if "anyOf" in schema:
        return " or ".join(_values(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} values, each {_values(schema['prefixItems'][0])}"
    if schema["type"] == "boolean":
        return "`true`, `false`"
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}"
    if schema["type"] == "object":
        return f"mapping of names to {_values(schema['additionalProperties'])}"
    if "pattern" in schema:
        return f"text that matches `{cell(schema['pattern'])}`"
    name = {"integer": "integer", "number": "number", "string": "text", "null": "null"}[schema["type"]]
    return ", ".join([name, *_bounds(schema)])


def _bounds(schema: Mapping[str, Any]) -> Iterable[str]:
    words = (
        (("ge", "minimum"), "at least"),
        (("gt", "exclusiveMinimum"), "above"),
        (("le", "maximum"), "at most"),
        (("lt", "exclusiveMaximum"), "below"),
    )
    powers = {2**63: "2^63", 10**9: "10^9"}
    for keys, word in words:
        for key in keys:
            if key in schema:
                yield f"{word} {powers.get(schema[key]) or format(schema[key], 'g')}"
