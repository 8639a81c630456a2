"""What bits do not depend on; `deterministic: false`: what a run says from then on instead of `bitwise`."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runs import new_run
from states import assert_same_state

from onward import Run, StepTaken, Wishes
from onward.library.torch_defaults import defaults_of_torch


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


def test_a_replay_blames_no_steps_that_were_taken_elsewhere(model: Path, tmp_path: Path) -> None:
    """What differs again is said, and that a process of another environment may have taken these steps."""
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4))
    run = new_run(tmp_path / "run", model, max_length=256, batch_size=2, lora={"rank": 2})
    stop = Wishes()
    run.train(file, observe=lambda event: stop.ask("a test") if isinstance(event, StepTaken) else None, stop=stop)
    run.train()
    said: list[str] = []
    for change in ("steps SET loss = loss + 1 WHERE step = 1", "handovers SET class = 'close' WHERE step = 1"):
        with closing(sqlite3.connect(run.layout.ledger)) as ledger, ledger:
            assert 1 == ledger.execute(f"UPDATE {change}").rowcount
        said += [check.detail for check in run.verify(deep=True).checks if check.name == "replay"]
    plain, elsewhere = said
    assert plain.startswith("step 1 of a.jsonl had loss ")
    assert elsewhere.startswith(f"steps up to 1 were taken in another environment (handover close): {plain}")


mkldnn: Any = torch.backends.mkldnn
Settings = tuple[torch.dtype, str, bool, int]
"""The default type, the precision of products, whether flash attention is allowed, and the number of threads."""


def of_torch() -> Settings:
    """Return settings of this process."""
    flash = torch.backends.cuda.flash_sdp_enabled()
    return torch.get_default_dtype(), mkldnn.matmul.fp32_precision, flash, torch.get_num_threads()


def set_torch(settings: Settings) -> None:
    """Set them; the same number of threads is not set again, which changes how MKL uses them."""
    torch.set_default_dtype(settings[0])
    mkldnn.matmul.fp32_precision = settings[1]
    torch.backends.cuda.enable_flash_sdp(settings[2])
    if settings[3] != torch.get_num_threads():
        torch.set_num_threads(settings[3])


@pytest.mark.parametrize("settings", [{"lora": {"rank": 2, "dropout": 0.1}}, {"method": "full", "dtype": "bfloat16"}])
def test_bits_do_not_depend_on_what_the_caller_set_for_torch(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """A notebook may have turned gradients off or another type on; afterwards it has what it set.

    What an observer sets lasts no longer than its call. Between steps the run is in no autocast, not even in a disabled
    one: weights that were cast are cast again then.
    """
    depths = set[int]()

    def observe(event: object) -> None:
        depths.add(torch.autocast_increment_nesting())
        torch.autocast_decrement_nesting()

    def disturb(event: object) -> None:
        observe(event)
        found.append(of_torch())
        set_torch(disturbed)
        torch.set_grad_enabled(False)

    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4))
    settings = {"max_length": 256, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0, **settings}
    Run.create(tmp_path / "plain", str(model), **settings).train(file, observe=observe)
    plain = of_torch()
    theirs, disturbed = (torch.float64, "bf16", False, plain[3]), (torch.float64, "bf16", False, plain[3] + 1)
    found: list[Settings] = []
    set_torch(theirs)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            Run.create(tmp_path / "set", str(model), **settings).train(file, observe=disturb)
            assert not torch.is_grad_enabled()
            assert (True, False) == (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())
            assert theirs == of_torch()
    finally:
        set_torch(plain)
    assert {(torch.float32, "ieee", True, plain[3])} == set(found)
    assert not torch.is_autocast_enabled("cpu")
    assert_same_state(tmp_path / "plain", tmp_path / "set")
    assert {1} == depths


def test_what_the_caller_set_is_left_until_the_last_thread_has_computed() -> None:
    """Threads that train different runs begin and end in any order."""
    inside, leave = threading.Event(), threading.Event()

    def compute() -> None:
        with defaults_of_torch():
            inside.set()
            leave.wait(60)

    plain, thread = of_torch(), threading.Thread(target=compute)
    theirs = (torch.float64, "bf16", False, plain[3])
    set_torch(theirs)
    try:
        with defaults_of_torch():
            thread.start()
            assert inside.wait(60)
        meanwhile = of_torch()
        leave.set()
        thread.join()
        assert theirs == of_torch()
    finally:
        set_torch(plain)
    assert (torch.float32, "ieee", True, plain[3]) == meanwhile
