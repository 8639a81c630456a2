"""`deterministic: false`: what a run says from then on instead of `bitwise`, and when it says it no longer."""

from __future__ import annotations

from pathlib import Path

import tiny

from onward import Run


def set_key(run: Path, value: bool) -> None:
    """Change the key in the config, as a user would."""
    config = run / "onward.yaml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("deterministic:")]
    config.write_text("\n".join([*lines, f"deterministic: {str(value).lower()}"]) + "\n")


def test_a_run_without_determinism_says_so(model: Path, tmp_path: Path) -> None:
    """Every handover of such files is `not deterministic` until the key is taken back; no replay proves them."""
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(4, seed=n)) for n in range(4)]
    run = Run.create(tmp_path / "run", str(model), max_length=256, batch_size=2, lora={"rank": 2})
    run.train(files[0])
    set_key(run.layout.root, value=False)
    run = Run(run.layout.root)
    run.train(*files[1:3])
    handovers = [entry["handover"] for entry in run.history()]
    assert ["bitwise", "not deterministic", "not deterministic"] == handovers
    assert run.verify().ok
    deep = run.verify(deep=True)
    assert ["replay"] == [check.name for check in deep.checks if not check.ok]
    assert "equal bits are not promised" in next(check.detail for check in deep.checks if not check.ok)
    set_key(run.layout.root, value=True)
    run = Run(run.layout.root)
    run.train(files[3], tiny.write_jsonl(tmp_path / "last.jsonl", tiny.chat_rows(4, seed=9)))
    assert [*handovers, "not deterministic", "bitwise"] == [entry["handover"] for entry in run.history()]
    assert run.verify(deep=True).ok
