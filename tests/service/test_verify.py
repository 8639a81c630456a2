"""Each claim of the proof fails when it is made false, one at a time."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from runs import new_run

from onward import Run
from onward.data.tokenized import TokenizedFile
from onward.digest import xxh3_file
from onward.errors import ConfigError, RunLocked
from onward.service.lock import RunLock
from onward.store.ledger import Ledger


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two files."""
    folder = tmp_path_factory.mktemp("trained")
    run = new_run(folder / "run", model, batch_size=4, max_length=256, epochs=2, lora={"rank": 4})
    run.train(*[tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (9, 6)])
    return run.layout.root


def sql(statement: str) -> Callable[[Path], None]:
    """Return a way to tamper with the ledger."""

    def tamper(root: Path) -> None:
        with Ledger(root / "ledger.sqlite3") as ledger:
            ledger.write(statement)

    return tamper


def raise_counter(root: Path) -> None:
    """Let `trainer_state.json` claim another step, in every place it is linked to."""
    path = next((root / "current_model").glob("checkpoint-*")) / "trainer_state.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "global_step": values["global_step"] + 1}))


def touch_original(root: Path) -> None:
    """Change the archived original of a file."""
    path = next((root / "archive").iterdir())
    path.write_bytes(path.read_bytes() + b"\n")


def change_root_file(root: Path) -> None:
    """Put other bytes in the place of a link to a file of the checkpoint."""
    path = root / "current_model" / "optimizer.pt"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"\n")


def put_back(root: Path, step: int) -> None:
    """Put the run's own checkpoint of an earlier boundary into `current_model/` again."""
    shutil.copytree(root / f"boundaries/step-{step}", root / f"current_model/checkpoint-{step}")


def change_tokens(root: Path) -> None:
    """Change a token of the last file in the cache, with its hashes, as if the file had begun with it."""
    for folder in (root / "cache/tokens").iterdir():
        path, meta = folder / "tokens.bin", json.loads((folder / "meta.json").read_text())
        tokens = bytearray(path.read_bytes())
        tokens[0] ^= 1
        path.write_bytes(tokens)
        meta["files"]["tokens.bin"]["xxh3"] = xxh3_file(path)
        meta.pop("xxh3")
        (folder / "meta.json").write_text(json.dumps(meta))
        digest = TokenizedFile.open(folder).digest
        sql(f"UPDATE files SET token_digest = '{digest}' WHERE sha256 = '{meta['source_sha256']}'")(root)


ANOTHER_BASE = """UPDATE run SET value = replace(value, '"base": "', '"base": "0') WHERE key = 'identity'"""
ANOTHER_WEIGHT = """after = replace(after, 'weights": "', 'weights": "0')"""
ANOTHER_STEP = "UPDATE checkpoints SET step = step - 1 WHERE step = (SELECT max(step) FROM checkpoints)"

TAMPERING: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file of the state": (raise_counter, "state files"),
    "a lost file": (lambda root: next((root / "current_model").glob("*/trainer_state.json")).unlink(), "state files"),
    "a second checkpoint": (lambda root: put_back(root, 6), "one checkpoint"),
    "a temporary file": (lambda root: (root / "current_model" / ".tmp-checkpoint-6").mkdir(), "one checkpoint"),
    "a root file": (change_root_file, "root files"),
    "a step too few": (sql("DELETE FROM steps WHERE step = 4"), "rows"),
    "other rows": (sql("UPDATE steps SET rows_digest = 'x' WHERE step = 2"), "rows"),
    "a learning rate": (sql("UPDATE steps SET learning_rate = 0.0 WHERE step = 5"), "learning rates"),
    "a handover": (sql(f"UPDATE handovers SET class = 'close', {ANOTHER_WEIGHT}"), "handovers"),
    "a probe": (sql("UPDATE handovers SET after = replace(after, 'probe_loss\": ', 'probe_loss\": 1')"), "handovers"),
    "no handover": (sql("DELETE FROM handovers"), "handovers"),
    "a restore point": (lambda root: (root / "boundaries" / "step-0" / "optimizer.pt").unlink(), "restore points"),
    "an original": (touch_original, "originals"),
    "the base": (sql(ANOTHER_BASE), "base model"),
    "a counter": (sql(ANOTHER_STEP), "one checkpoint"),
    "a loss": (sql("UPDATE steps SET loss = loss + 1 WHERE step = (SELECT max(step) FROM steps)"), "replay"),
    "an earlier loss": (sql("UPDATE steps SET loss = loss + 1 WHERE step = 6"), "step counters"),
    "trained tokens": (sql("UPDATE steps SET target_tokens = 1 WHERE step = 2"), "step counters"),
    "the order of files": (sql("UPDATE files SET position = 7 - 3 * position"), "step counters"),
    "totals of steps": (sql("UPDATE step_ranges SET loss_max = 9 WHERE first = 1"), "step counters"),
    "a norm": (sql("UPDATE steps SET grad_norm = 0 WHERE step = (SELECT max(step) FROM steps)"), "replay"),
    "tokens": (change_tokens, "replay"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_named(name: str, trained: Path, tmp_path: Path) -> None:
    """Each change behind the run's back fails the check that covers it."""
    tamper, check = TAMPERING[name]
    root = shutil.copytree(trained, tmp_path / "run", copy_function=shutil.copy2)
    assert Run(root).verify().ok
    tamper(root)
    proof = Run(root).verify(deep=check == "replay")
    assert not proof.ok
    assert check in [entry.name for entry in proof.checks if not entry.ok]
    assert [] == [entry.detail for entry in proof.checks if "Errno" in entry.detail]
    if name == "a second checkpoint":
        (detail,) = (entry.detail for entry in proof.checks if entry.name == check)
        assert "an interrupted commit left checkpoint-6 beside checkpoint-10; onward train removes it" == detail


def test_proof_of_a_new_run(model: Path, tmp_path: Path) -> None:
    """A run that has trained nothing verifies too."""
    proof = new_run(tmp_path / "run", model).verify(deep=True)
    assert proof.ok
    assert "nothing has been trained yet" == proof.checks[0].detail


def test_deep_proof_trains_again(trained: Path) -> None:
    """`deep` trains the last file again from its boundary and finds the same bits; the run is not touched."""
    before = {path: path.read_bytes() for path in trained.rglob("*.safetensors")}
    proof = Run(trained).verify(deep=True)
    assert proof.ok
    assert "4 steps from step 6 trained again" in proof.checks[-1].detail
    assert before == {path: path.read_bytes() for path in trained.rglob("*.safetensors")}


def test_a_machine_that_computes_wrong_says_nothing_about_the_run(trained: Path) -> None:
    """Where no product is sure to be whole, `deep` is refused with the setting, and is no failed verification."""
    openmp, threads = ctypes.CDLL(None), torch.get_num_threads()
    if not hasattr(openmp, "omp_set_dynamic"):
        pytest.skip("this release of PyTorch has no OpenMP")
    try:
        torch.set_num_threads(2)
        openmp.omp_set_dynamic(1)
        with pytest.raises(ConfigError, match="products would be wrong"):
            Run(trained).verify(deep=True)
    finally:
        openmp.omp_set_dynamic(0)
        torch.set_num_threads(threads)


def test_no_proof_of_a_state_that_moves(trained: Path) -> None:
    """While a process owns the run `verify` is refused, and says who owns it."""
    with RunLock(Run(trained).layout.lock), pytest.raises(RunLocked, match="another process owns"):
        Run(trained).verify()


def test_the_last_proof_is_kept(trained: Path) -> None:
    """The ledger keeps the outcome of the last verify, with its time and step, for who looks later."""
    proof = Run(trained).verify()
    with Ledger(trained / "ledger.sqlite3", read_only=True) as ledger:
        kept = ledger.get("verified")
        assert (ledger.committed_step(), False) == (kept["step"], kept["deep"])
    assert proof.to_dict() == {"ok": kept["ok"], "checks": kept["checks"]}
