"""What may be a password is in the config file and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemons import configure, rows_file
from runs import new_run

from onward.config import NotifyConfig, stored_config
from onward.config.text import parse_config
from onward.errors import ConfigError
from onward.layout import RunLayout
from onward.service.outside.reporting import Reporter
from onward.store.ledger import Ledger, make_ledger

SECRET = "hunter2"


def holding(root: Path) -> list[str]:
    """Return the files of a run that hold the secret, anywhere in their bytes."""
    files = (path for path in root.rglob("*") if path.is_file())
    return sorted({path.name for path in files if SECRET.encode() in path.read_bytes()})


def test_a_secret_reaches_no_manifest_ledger_or_event(model: Path, tmp_path: Path) -> None:
    """Trained with an address and a command that hold a secret, changed in between: only the config file has it."""
    notify = {"url": f"http://127.0.0.1:9/{SECRET}", "command": f"false {SECRET}", "events": []}
    run = new_run(tmp_path / "run", model, max_length=256, notify=notify)
    run.train(rows_file(tmp_path / "a.jsonl", 4))
    configure(run, notify={**notify, "url": f"http://127.0.0.1:9/again/{SECRET}"}, max_grad_norm=0.5)
    run.train(rows_file(tmp_path / "b.jsonl", 5))
    assert ["onward.yaml"] == holding(run.layout.root)
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        changes = [event.message for event in ledger.events(100) if event.kind == "config"]
    assert ["config: max_grad_norm changed from 1.0 to 0.5"] == changes
    assert run.verify(deep=True).ok


def test_a_record_of_before_is_read_all_the_same() -> None:
    """A manifest that still holds address and command gives the config that it was written with."""
    config = parse_config({"notify.url": "http://example.org/hook", "notify.command": "tell me"})
    assert config == stored_config(config.model_dump(mode="json"))
    assert {"notify": {"events": ["rejected", "failed", "paused"]}} == {"notify": config.recorded()["notify"]}
    assert stored_config(config.recorded()).training() == config.training()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"notify.url": f"htps://{SECRET}"}, "notify.url"),
        ({"notify.ulr": SECRET}, "notify.ulr"),
        ({"notify.command": [SECRET]}, "notify.command"),
        ({"notify": SECRET}, "notify"),
        ({"notify": {"events": [f"https://{SECRET}"]}}, "notify.events.0"),
        ({"notfy": {"url": SECRET}}, "notfy"),
        ({"notify_url": SECRET}, "notify_url"),
        ({"hub_token": SECRET}, "hub_token"),
        ({"evaluation": {"token": SECRET}}, "evaluation.token"),
        ({"track": [f"https://{SECRET}@127.0.0.1"]}, "track.0"),
        ({"track": [{"wandb": {"api_key": SECRET}}]}, "track.0"),
        ({"track": {"wandb": SECRET}}, "track"),
    ],
)
def test_a_refusal_does_not_repeat_it(values: dict[str, object], key: str) -> None:
    """A secret that is misspelt, under a misspelt key or in the wrong place is refused without being shown."""
    with pytest.raises(ConfigError) as refused:
        parse_config(values)
    assert SECRET not in str(refused.value)
    assert key in str(refused.value)


@pytest.mark.parametrize(
    ("notify", "reason"),
    [
        ({"command": f"false {SECRET}"}, "notify.command failed: exit status 1"),
        ({"command": f"no-such-{SECRET}"}, "notify.command failed: No such file or directory"),
        ({"url": f"http://127.0.0.1:9/{SECRET}"}, "notify.url failed: Connection refused"),
        ({"url": f"http://127.0.0.1:9/ {SECRET}"}, "notify.url failed: InvalidURL"),
    ],
)
def test_the_log_says_what_failed_without_it(notify: dict[str, str], reason: str, tmp_path: Path) -> None:
    """A notification that fails is a line in the log, with the reason and without command and address."""
    layout = RunLayout(tmp_path)
    layout.make()
    make_ledger(layout.ledger)
    reporter = Reporter(layout, lambda: NotifyConfig(**notify, events=["done"]))  # pyright: ignore[reportArgumentType]
    with Ledger(layout.ledger) as ledger:
        ledger.add_event("info", "one", kind="done")
    reporter.report()
    reporter.close()
    assert reason in layout.log.read_text()
    assert [] == holding(tmp_path)
