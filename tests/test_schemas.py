"""What `--json` prints is what docs/schemas/ says, for every command that has the option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from commands import onward
from typer.main import get_command

from onward import cli
from onward.config import Config
from onward.config.schema import MODELINE, config_schema, schema_text
from onward.config.text import parse_config, read_config
from onward.errors import ConfigError

Draft202012Validator = pytest.importorskip("jsonschema", reason="part of onward[dev]").Draft202012Validator

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"


NOT_HERE = {"accept", "push"}
"""Commands that need what this run has not: a file that the guard took back, a hub. Their own tests hold them."""


def schema(name: str) -> Any:
    """Return the schema of a command."""
    return json.loads((SCHEMAS / f"{name}.json").read_text())


def reporting_commands() -> set[str]:
    """Return the commands that have `--json`."""
    group: Any = get_command(cli.app)
    return {
        name for name, command in group.commands.items() if any("--json" in option.opts for option in command.params)
    }


def test_every_command_that_reports_has_a_schema() -> None:
    """There is a schema for each command with `--json`, valid itself, and none for another."""
    assert reporting_commands() == {path.stem for path in SCHEMAS.glob("*.json")}
    for name in reporting_commands():
        Draft202012Validator.check_schema(schema(name))
        assert f"onward {name} --json" == schema(name)["title"]


@pytest.mark.slow
def test_output_is_as_its_schema_says(model: Path, tmp_path: Path) -> None:
    """Every command with `--json`, run on a run that has trained, refused, waited and gone back."""
    outputs: dict[str, list[Any]] = {name: [] for name in reporting_commands()}

    def note(command: str, *arguments: object, status: int = 0) -> Any:
        outcome = onward(command, *arguments, "--json")
        assert status == outcome.status, (command, outcome.err)
        outputs[command].append(outcome.json)
        return outcome.json

    first, second, third = (
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.chat_rows(4, seed)) for seed, name in enumerate("abc")
    )
    run = tmp_path / "run"
    note("init", run, "--model", model, "--set", "track=[nobody]", "--set", "batch_size=4", "--set", "lora.rank=2")
    for empty in ("status", "history", "metrics"):
        note(empty, "--run", run)
    note("train", first, second, "--run", run)
    note("track", "--run", run, status=1)
    note("add", third, "--run", run)
    for command in ("status", "history", "metrics", "verify", "doctor", "pause", "resume", "stop"):
        note(command, "--run", run)
    note("preview", third, "--run", run)
    note("preview", third, "--estimate", "--run", run)
    for command in ("grid", "evaluate"):
        note(command, "--run", run)
    note("compare", "boundary=carry", "boundary=rewarm", "--last", "1", "--seeds", "1", "--run", run)
    note("release", "v1", "--run", run)
    note("releases", "--run", run)
    note("chat", "--message", "a", "--max-tokens", "2", "--run", run)
    note("export", tmp_path / "exported", "--run", run)
    note("skip", "c.jsonl", "--run", run)
    note("adopt", next((run / "current_model").glob("checkpoint-*")), "--run", tmp_path / "adopted")
    note("rebuild", "--without", "b.jsonl", "--yes", "--run", run)
    note("rollback", "--to", "step:0", "--yes", "--run", run)
    note("reset", "--yes", "--run", run)
    note("history", "--run", run)
    for name, values in outputs.items():
        validator = Draft202012Validator(schema(name))
        assert values or name in NOT_HERE, f"{name} was not run"
        for value in values:
            assert [] == [error.message for error in validator.iter_errors(value)], name


def test_a_new_run_names_the_schema_of_its_config(model: Path, tmp_path: Path) -> None:
    """The first line of `onward.yaml` names a schema next to it, which takes what was written."""
    assert 0 == onward("init", tmp_path / "run", "--model", model, "--later").status
    text = (tmp_path / "run" / "onward.yaml").read_text()
    assert MODELINE == text.splitlines()[0]
    named = tmp_path / "run" / MODELINE.partition("$schema=")[2]
    assert schema_text() == named.read_text()
    assert Draft202012Validator(json.loads(named.read_text())).is_valid(yaml.safe_load(text))
    assert read_config(tmp_path / "run" / "onward.yaml") == parse_config(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("values", "is_valid"),
    [
        ({}, True),
        ({"batch_size": 4, "lora": {"rank": 8}}, True),
        ({"lora.rank": 8, "notify.events": ["done"]}, True),
        ({"track": ["wandb"]}, True),
        ({"lora.rnak": 8}, False),
        ({"batch_size": 0}, False),
        ({"lora": {"rank": 0}}, False),
        ({"schedule": "cosinus"}, False),
        ({"track": ["W&B"]}, False),
    ],
)
def test_the_schema_takes_what_the_config_takes(values: dict[str, Any], is_valid: bool) -> None:
    """An editor marks the keys and values that a start would refuse."""
    assert is_valid == Draft202012Validator(config_schema()).is_valid(values)
    try:
        parse_config(values)
    except ConfigError:
        assert not is_valid
    else:
        assert is_valid


def test_the_schema_has_a_description_for_every_key() -> None:
    """What docs/config.md says of a key, an editor shows too."""
    schema = config_schema()
    assert Config.model_fields.keys() <= schema["properties"].keys()
    assert [] == [key for key, value in schema["properties"].items() if not value.keys() & {"description", "$ref"}]
