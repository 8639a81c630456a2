"""The config: what is accepted, what is refused, and when a change takes effect."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import make_run, onward

from onward.config import Config, known_keys, stored_config
from onward.config.elsewhere import KEYS_ELSEWHERE
from onward.config.keys import HORIZON_SCHEDULES, IDENTITY_KEYS, LATER_IDENTITY_KEYS
from onward.config.text import parse_config, parse_settings, read_config, render_yaml
from onward.errors import ConfigError, Unreadable
from onward.store.ledger import Ledger

CLI = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
KEYS = [
    "model", "method", "seed", "dtype", "deterministic", "max_length", "over_length", "batch_size",
    "gradient_accumulation", "micro_batch_tokens", "activation_checkpointing", "cuda_graphs", "epochs", "parts",
    "exchange", "rank_timeout", "sharding",
    "learning_rate", "schedule", "warmup_steps", "total_steps", "track", "min_learning_rate", "weight_decay", "betas",
    "max_grad_norm", "eps", "schedule_offset", "save_steps", "log_steps", "keep_boundaries", "boundary",
    "lora.rank", "lora.alpha", "lora.dropout", "lora.targets", "keep_days", "settle_seconds", "retries",
    "disk_margin_mb", "compress_archive", "notify.command", "notify.url", "notify.events",
    "max_row_mb", "max_unpacked_mb", "max_unpack_ratio", "columns", "text.documents", "bad_rows", "bad_rows_share",
    "holdout", "evaluation.rows", "evaluation.share", "evaluation.files", "replay.share", "replay.policy",
    "anchor.rows", "anchor.tokens", "anchor.weight", "guard.action", "guard.forgetting", "guard.anchor", "guard.spike",
    "guard.answers",
    *LATER_IDENTITY_KEYS,
]  # fmt: skip
"""Every key. A new one is a decision: it is documented, tested and added here."""


def test_the_config_surface_is_frozen() -> None:
    """The keys of a config are these and no others."""
    assert sorted(KEYS) == sorted(known_keys())


def test_every_key_says_what_it_means() -> None:
    """Each key has a description; onward.yaml and the reference are made of them."""
    text = render_yaml(Config())
    for key in KEYS:
        section, _, name = key.rpartition(".")
        (block,) = re.findall(rf"^{section}:\n((?:  .*\n)+)", text, re.M) if section else [text]
        assert re.search(rf"^{'  ' if section else ''}{name}: .*  # .", block, re.M), key


def test_identity_keys_are_keys() -> None:
    """Every identity key is a key of the config; a full run has no adapter and so no identity of one, and where the
    method of a run is changed to that, the refusal names the method alone.
    """
    assert set(IDENTITY_KEYS) <= set(KEYS)
    first = set(IDENTITY_KEYS) - set(LATER_IDENTITY_KEYS)
    assert first == set(Config().identity())
    assert {key for key in first if not key.startswith("lora.")} == set(Config(method="full").identity())
    dora = parse_config({"lora.use_dora": True}).identity()
    assert {*first, "lora.use_dora"} == set(dora)
    assert {"method": ("lora", "full")} == Config(method="full").identity_changes(dora)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lora.targets": ["q_proj", "v_proj"], "betas": [0.8, 0.95], "schedule": "linear", "total_steps": 500},
        {"model": "a: b # c", "learning_rate": 1e-7, "seed": 2**62},
        {"model": "über/模型 'x' \"y\""},
        {key: Path("a") for key in ("model", "adapter", "chat_template")} | {"evaluation.files": [Path("b")]},
    ],
    ids=["defaults", "lists", "yaml-signs", "unicode", "paths"],
)
def test_a_rendered_config_reads_back_equal(values: dict[str, Any], tmp_path: Path) -> None:
    """What `render_yaml` writes, `read_config` reads as the same config."""
    config = parse_config(values)
    (tmp_path / "onward.yaml").write_text(render_yaml(config), encoding="utf-8")
    assert config == read_config(tmp_path / "onward.yaml")


def test_dotted_and_nested_keys_mean_the_same() -> None:
    """`lora.rank` and `lora: {rank: ...}` are one key, also side by side."""
    expected = parse_config({"lora": {"rank": 4, "alpha": 8}})
    assert expected == parse_config({"lora.rank": 4, "lora.alpha": 8})
    assert expected == parse_config({"lora.rank": 4, "lora": {"alpha": 8}})
    assert expected == parse_config(parse_settings(["lora.rank=4", "lora={alpha: 8}"]))


def test_flat_values_make_the_same_config() -> None:
    """A config can be taken apart by dotted key and put together again."""
    config = parse_config({"lora.rank": 4, "betas": [0.8, 0.9]})
    assert config == parse_config(config.flat())
    assert sorted(KEYS) == sorted(config.flat())


def test_differences_name_key_and_both_values() -> None:
    """What differs between two configs is named by dotted key, with the old and the new value."""
    old, new = Config(), parse_config({"lora.dropout": 0.0, "epochs": 2})
    assert {"lora.dropout": (0.05, 0.0), "epochs": (1, 2)} == old.differences(new)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_rate_may_be_written_in_any_way(text: str, tmp_path: Path) -> None:
    """`1e-4` is a number, although YAML 1.1 reads it as text."""
    (tmp_path / "onward.yaml").write_text(f"learning_rate: {text}\n")
    assert 1e-4 == read_config(tmp_path / "onward.yaml").learning_rate
    assert 1e-4 == parse_config(parse_settings([f"learning_rate={text}"])).learning_rate


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batchsize": 8}, ["unknown key 'batchsize'", "did you mean 'batch_size'"]),
        ({"rank": 8}, ["unknown key 'rank'", "did you mean 'lora.rank'"]),
        ({"lora": {"r": 8}}, ["unknown key 'lora.r', which here is 'lora.rank'"]),
        ({"max_steps": 9, "batchsize": 8}, ["unknown key 'max_steps', which here is no key", "'batchsize' (did you"]),
        ({"lora.rank.deep": 8}, ["unknown key 'lora.rank.deep'", "did you mean 'lora.rank'"]),
        ({"batch_size": True}, ["batch_size: true", "must be a number, not true or false"]),
        ({"learning_rate": False}, ["learning_rate: false", "not true or false"]),
        ({"betas": [True, 0.9]}, ["betas.0: true"]),
        ({"batch_size": 1.5}, ["batch_size: 1.5", "integer"]),
        ({"batch_size": None}, ["batch_size: null"]),
        ({"lora": 5}, ["lora: 5", "it is a section, whose keys are written with a dot, such as lora.rank"]),
        ({"lora.targets": []}, ["lora.targets is empty"]),
        ({"lora.dropout": 1.0}, ["lora.dropout: 1.0", "less than 1"]),
        ({"learning_rate": float("inf")}, ["learning_rate: inf"]),
        ({"learning_rate": float("nan")}, ["learning_rate: nan"]),
        ({"learning_rate": -1}, ["learning_rate: -1", "greater than 0"]),
        ({"min_learning_rate": 1.0}, ["min_learning_rate 1.0 is above learning_rate"]),
        ({"method": "Lora"}, ["method: 'Lora'", "did you mean 'lora'"]),
        ({"over_length": "cut"}, ["over_length: 'cut'", "'truncate', 'drop' or 'reject'"]),
        ({"schedule": "cosine"}, ["schedule cosine needs total_steps"]),
        ({"schedule": "linear", "total_steps": 10}, ["total_steps 10 is not above warmup_steps 10"]),
        ({"max_length": 1}, ["max_length: 1"]),
        ({"seed": -1}, ["seed: -1"]),
        ({"model": ""}, ["model: ''"]),
        ({"holdout": 2}, [f"holdout: 2 is refused: input should be {words}" for words in ("'auto'", "less")]),
        ({"batch_size": 0, "epochs": 0}, ["batch_size: 0", "epochs: 0"]),
        ({"epochs": 10**9, "max_row_mb": 10**9}, [f"epochs: {10**9}", f"max_row_mb: {10**9}"]),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], words: list[str]) -> None:
    """Unknown keys, wrong types and impossible values are refused with key, value and the nearest right name."""
    with pytest.raises(ConfigError) as refusal:
        parse_config(values, where="here")
    assert [] == [word for word in [*words, "[here]", "docs/config.md"] if word not in str(refusal.value)], (
        refusal.value
    )
    assert 2 == refusal.value.exit_status


def test_a_key_of_another_tool_is_answered_by_what_it_is_here() -> None:
    """No such name is a key here or stands twice, and every key and command that its answer names exists."""
    names = [name for names, _ in KEYS_ELSEWHERE for name in names]
    assert [] == [name for name in names if name in known_keys() or names.count(name) > 1]
    for told in (word.partition(":")[0] for _, here in KEYS_ELSEWHERE for word in re.findall("`([^`]+)`", here)):
        command = re.match("onward [a-z]+", told)
        assert f"## {command[0]}\n" in CLI if command else told in (*known_keys(), *HORIZON_SCHEDULES), told


def test_a_schedule_with_a_horizon_takes_one() -> None:
    """`cosine` and `linear` are accepted with `total_steps` beyond the warmup; the others need none."""
    for schedule in ("cosine", "linear"):
        assert 11 == parse_config({"schedule": schedule, "total_steps": 11}).total_steps
    for schedule in ("constant", "inverse_sqrt", "wsd"):
        assert parse_config({"schedule": schedule}).total_steps is None


def test_what_was_trained_with_is_kept_where_it_is_refused_today() -> None:
    """A recorded value is a fact: it stays what it was, next to others in the types that they have today."""
    values = Config(lora={"rank": 2}).model_dump(mode="json")  # type: ignore[arg-type]
    values |= {"retries": -1, "learning_rate": 1e-5, "min_learning_rate": 1.0, "text": {"documents": "page", "old": 1}}
    config = stored_config(values)
    assert (-1, 1e-5, 1.0, "page") == (
        config.retries, config.learning_rate, config.min_learning_rate, config.text.documents
    )  # fmt: skip
    assert (2, (0.9, 0.999), 8) == (config.lora.rank, config.betas, config.batch_size)


def test_a_line_added_at_the_end_of_a_config_takes_effect(tmp_path: Path) -> None:
    """`echo "parts: 8" >> onward.yaml`, as docs/launch.md recommends; docs/experiments.md has why."""
    (tmp_path / "onward.yaml").write_text(render_yaml(Config()))
    with (tmp_path / "onward.yaml").open("a") as config:
        config.write("parts: 8\n")
    assert 8 == read_config(tmp_path / "onward.yaml").parts


@pytest.mark.parametrize("name", ["onward.yaml", "config.json"])
def test_a_number_that_has_no_end_is_refused_in_words(name: str, tmp_path: Path) -> None:
    """Python reads no number of thousands of digits: that is a refusal of the config, not a crash."""
    (tmp_path / name).write_text(f'{{"batch_size": {"9" * 5000}}}')
    with pytest.raises(ConfigError, match="the config cannot be read") as refused:
        read_config(tmp_path / name)
    assert str(tmp_path / name) == refused.value.where
    with pytest.raises(ConfigError, match="the value of batch_size cannot be read"):
        parse_settings([f"batch_size={'9' * 5000}"])


def test_config_json_is_read_where_no_yaml_is(model: Path, tmp_path: Path) -> None:
    """`config.json` with the same keys takes the place of onward.yaml, and `init` keeps it."""
    (tmp_path / "run").mkdir()
    config = tmp_path / "run/config.json"
    config.write_text(json.dumps({"model": str(model), "batch_size": 3, "lora": {"rank": 2}}), encoding="utf-8-sig")
    outcome = onward("init", tmp_path / "run", "--json")
    assert 0 == outcome.status, outcome.err
    assert (3, 2) == (outcome.json["config"]["batch_size"], outcome.json["config"]["lora"]["rank"])
    assert not (tmp_path / "run/onward.yaml").exists()
    assert parse_config({"model": str(model), "batch_size": 3, "lora.rank": 2}) == read_config(config)


def change(run: Path, old: str, new: str) -> None:
    """Edit a setting in onward.yaml as a user would."""
    text = (run / "onward.yaml").read_text()
    assert old in text
    (run / "onward.yaml").write_text(text.replace(old, new))


def train(run: Path, seed: int) -> Any:
    """Train a file of eight rows; return its entry of the history."""
    outcome = onward(
        "train", tiny.write_jsonl(run.parent / f"{seed}.jsonl", tiny.chat_rows(8, seed)), "--run", run, "--json"
    )
    assert 0 == outcome.status, outcome.err
    return outcome.json[-1]


def test_a_change_takes_effect_at_the_next_boundary(model: Path, tmp_path: Path) -> None:
    """A changed learning rate holds from the next file on, and the ledger records key, step and both values."""
    run = make_run(tmp_path / "run", model, "learning_rate=0.001", "warmup_steps=0", "lora.dropout=0.1")
    assert 0.001 == train(run, 1)["last_learning_rate"]
    change(run, "learning_rate: 0.001 ", "learning_rate: 5e-4 ")
    change(run, "batch_size: 4", "batch_size: 2")
    second = train(run, 2)
    assert (0.0005, 0.0005) == (second["first_learning_rate"], second["last_learning_rate"])
    assert (3, 6) == (second["first_step"], second["last_step"])
    assert 0.0005 == train(run, 3)["first_learning_rate"]
    with Ledger(run / "ledger.sqlite3", read_only=True) as ledger:
        changes = ledger.query("SELECT key, step, old, new FROM config_changes ORDER BY id")
        events = [event.message for event in ledger.events(1000)]
    assert [("batch_size", 2, "4", "2"), ("learning_rate", 2, "0.001", "0.0005")] == sorted(
        (entry["key"], entry["step"], entry["old"], entry["new"]) for entry in changes
    )
    assert "config: learning_rate changed from 0.001 to 0.0005" in events
    assert 0 == onward("verify", "--run", run).status


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: 0", "seed: 7", "seed: the run has 0, the config says 7"),
        ("rank: 2", "rank: 3", "lora.rank: the run has 2, the config says 3"),
        ('method: "lora"', "method: full", "method: the run has 'lora', the config says 'full'"),
        ('dtype: "auto"', "dtype: bfloat16", "dtype: the run has 'auto', the config says 'bfloat16'"),
    ],
    ids=["seed", "rank", "method", "dtype"],
)
def test_identity_is_locked_once_the_run_has_trained(
    old: str, new: str, words: str, model: Path, tmp_path: Path
) -> None:
    """An identity key may change before the first step; afterwards it is refused with the difference, exit 2."""
    run = make_run(tmp_path / "run", model)
    change(run, "alpha: 32.0", "alpha: 8.0")
    train(run, 1)
    change(run, old, new)
    outcome = onward("train", tiny.write_jsonl(tmp_path / "next.jsonl", tiny.chat_rows(4, 9)), "--run", run)
    assert 2 == outcome.status, outcome.err
    assert words in outcome.err
    assert "onward init NEW_RUN" in outcome.err
    change(run, new, old)
    assert 2 == train(run, 2)["position"]


def test_a_config_that_cannot_be_read_now_is_not_broken(tmp_path: Path) -> None:
    """A disk that fails is no reason to write the file anew: the error says so, and a daemon waits."""
    path = tmp_path / "onward.yaml"
    if not Path("/proc/self/mem").exists():
        pytest.skip("no /proc here")
    path.symlink_to("/proc/self/mem")  # its first byte is an input/output error
    with pytest.raises(Unreadable, match="Input/output error"):
        read_config(path)
