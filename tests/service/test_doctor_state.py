"""What doctor and verify say of a ledger and of checkpoints that do not belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from examined import findings

from onward import Run
from onward.digest import sha256_json
from onward.errors import DamagedState
from onward.layout import MANIFEST, RunLayout, step_of
from onward.service.proof.doctor import machine, state
from onward.store.ledger import Ledger, make_ledger
from onward.training.checkpoints.checkpoint import Inspection, Manifest, inspect_checkpoint


def lose_ledger(layout: RunLayout) -> None:
    """Put a new, empty ledger in the place of the run's."""
    layout.ledger.unlink()
    make_ledger(layout.ledger)


def empty_ledger(layout: RunLayout) -> None:
    """Leave a ledger that has its tables and nothing in them."""
    layout.ledger.unlink()
    Ledger(layout.ledger, create=True).close()


@pytest.mark.parametrize("lose", [lose_ledger, empty_ledger])
def test_a_ledger_that_knows_less_than_the_directory(lose: Callable[[RunLayout], None], layout: RunLayout) -> None:
    """A checkpoint alongside a ledger that never made it is an error, with the command that goes on from it."""
    lose(layout)
    place = layout.checkpoints()[0]
    (found,) = findings(layout, f"current_model/{place.name}")
    assert ("error", "belongs to another run than the ledger, which is at step 0") == (found.level, found.message)
    assert f"onward adopt {place} --run NEW_RUN" in str(found.hint)
    assert (lose is empty_ledger) == ([entry.level for entry in findings(layout, "ledger")] == ["error"])


def test_a_checkpoint_of_others_is_named(layout: RunLayout) -> None:
    """A directory that Onward did not make is named as such, not as damage."""
    folder = layout.checkpoint(900)
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    (found,) = findings(layout, "current_model/checkpoint-900")
    assert ("warning", f"not made by Onward: it has no {MANIFEST}") == (found.level, found.message)


def test_a_copy_under_another_name_is_named(layout: RunLayout) -> None:
    """It verifies, but it is not the run's: nothing continues from it."""
    made = layout.checkpoints()[0]
    shutil.copytree(made, layout.checkpoint(900))
    (found,) = findings(layout, "current_model/checkpoint-900")
    expected = f"a copy of step {step_of(made)}, not made by this run under this name, and left alone"
    assert ("warning", expected) == (found.level, found.message)


def test_a_checkpoint_that_the_ledger_does_not_have_yet_is_named(layout: RunLayout) -> None:
    """As a kill between the rename and the ledger leaves it; the next start counts it."""
    newest, before = layout.restore_points()[:2]
    with Ledger(layout.ledger) as ledger:
        ledger.write("UPDATE checkpoints SET state = 'writing' WHERE step = ?", step_of(newest))
    seen = [(finding.level, finding.message) for finding in state.check_checkpoints(layout) if finding.level != "ok"]
    assert [("warning", f"newer than the ledger, which is at step {step_of(before)}")] * 2 == seen


def test_what_a_process_that_trains_replaces_meanwhile_is_no_finding(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore point that is removed while it is read, and a checkpoint that is replaced while it is measured."""
    gone, size = layout.restore_points()[-1], sum(path.stat().st_size for path in layout.checkpoints()[0].iterdir())

    def inspect_late(folder: Path) -> Inspection:
        if folder == gone:
            shutil.rmtree(folder)
        return inspect_checkpoint(folder)

    monkeypatch.setattr(state, "inspect_checkpoint", inspect_late)
    assert {"ok"} == {finding.level for finding in state.check_checkpoints(layout)}
    found = iter([[layout.checkpoint(900)], layout.checkpoints()])
    monkeypatch.setattr(RunLayout, "checkpoints", lambda _: next(found))
    assert f"a checkpoint takes {size / 1e6:.0f} MB" in next(machine.check_disk(layout)).message


def test_a_run_of_before_verifies(layout: RunLayout) -> None:
    """What it was trained with is not judged: the run verifies, also by training again.

    A key that no longer exists, in manifests and ledger, is left out, and a value that is no longer allowed is kept.
    """
    before = {"key_of_before": 1, "retries": -1, "guard": {"action": "shout"}}
    for folder in [*layout.checkpoints(), *layout.restore_points()]:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        config = {**manifest.config, **before, "notify": {**manifest.config["notify"], "old": "x"}}
        sealed = manifest.model_copy(update={"config": config, "digest": ""}).sealed()
        (folder / MANIFEST).write_text(sealed.model_dump_json())
    with Ledger(layout.ledger) as ledger:
        for row in ledger.files("done"):
            config = {**ledger.config_of(row), **before}
            ledger.keep_config(sha256_json(config), config)
            ledger.write("UPDATE files SET config = ? WHERE id = ?", sha256_json(config), row.id)
    proof = Run(layout.root).verify(deep=True)
    assert [] == [(check.name, check.detail) for check in proof.checks if not check.ok]


@pytest.mark.parametrize("kept", ["both states", "the newer state"])
def test_a_ledger_of_an_earlier_moment_is_named_before_a_start_refuses_it(
    layout: RunLayout, tmp_path: Path, kept: str
) -> None:
    """After a copy of the ledger was put back, doctor and verify say what a start says, with a command that works."""
    later = RunLayout(Path(shutil.copytree(layout.root, tmp_path / "later")))
    Run(later.root).train(tiny.write_jsonl(tmp_path / "c.jsonl", tiny.chat_rows(4, seed=9)))
    newer = later.checkpoints()[0]
    if kept == "the newer state":
        shutil.rmtree(layout.current)
        shutil.copytree(later.current, layout.current)
    else:
        shutil.copytree(newer, layout.checkpoint(step_of(newer)))
    words = f"onward adopt {layout.checkpoint(step_of(newer))} --run NEW_RUN"
    (found,) = findings(layout, f"current_model/{newer.name}")
    assert ("error", True) == (found.level, words in str(found.hint))
    failed = [check.detail for check in Run(layout.root).verify().checks if not check.ok]
    assert failed
    assert all(words in detail for detail in failed)
    with pytest.raises(DamagedState, match="not from the same moment") as refused:
        Run(layout.root).train()
    assert words in str(refused.value.hint)
    adopted = Run.adopt(layout.checkpoint(step_of(newer)), tmp_path / "new")
    assert step_of(newer) == adopted.status()["global_step"]


def test_a_removed_state_is_named_before_a_start_refuses_it(layout: RunLayout) -> None:
    """Without current_model doctor and verify say what a start says; nobody promises that training repairs it."""
    shutil.rmtree(layout.current)
    (found,) = findings(layout, "state")
    assert ("error", "current_model is gone, but the ledger claims 3 steps") == (found.level, found.message)
    (state,) = [check for check in Run(layout.root).verify().checks if check.name == "state files"]
    with pytest.raises(DamagedState, match="current_model is gone") as refused:
        Run(layout.root).train()
    assert (False, found.hint) == (state.ok, refused.value.hint)
    assert str(found.hint) in state.detail


@pytest.mark.parametrize("spared", [True, False])
def test_verify_promises_a_repair_only_where_a_start_makes_it(layout: RunLayout, spared: bool) -> None:
    """Damage is repaired from a restore point that verifies; where none does, the way out is a copy."""
    for folder in [*layout.checkpoints(), *layout.restore_points()[: -1 if spared else None]]:
        (folder / "optimizer.pt").write_bytes(b"damaged")
    (state,) = [check for check in Run(layout.root).verify().checks if check.name == "state files"]
    assert spared == ("onward train repairs it" in state.detail)
    if spared:
        Run(layout.root).train()
        assert Run(layout.root).verify().ok
        return
    with pytest.raises(DamagedState, match="no checkpoint or restore point verifies"):
        Run(layout.root).train()
