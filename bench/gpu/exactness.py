"""Whether steps give the same bits: `exactness.py twice SHAPE METHOD DTYPE`, `exactness.py files|kills SHAPE`.

`twice` takes 20 steps from the same weights two times in one process; the first time, parts of the same sizes are
replayed, where the method and the type allow that. Its method `anchored` is LoRA with trained rows of the embedding and
with an anchor, whose texts the model writes each time. `files` trains three files in one process and in
three, and lets the run prove itself. `kills` ends a process by SIGKILL at five instants of a file and its commits, and
lets another one go on.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_steps import batch_of, endless_plan, let_record
from record import emit
from shapes import device, saved_model, text_file
from turns import wait

STEPS, SHAPES, INSTANTS = 20, 4, 5
"""Steps, after how many of them the lengths of rows repeat, and the instants of kills."""
LENGTHS = {"small": (5, 4000), "tiny": (5, 60)}
"""Tokens of the rows of one batch, by shape."""
ANCHORED: dict[str, Any] = {"anchor": {"weight": 0.5, "rows": 8, "tokens": 32}}
TRAINED_ROWS = [65, 66, 70]


def twice(shape: str, method: str, dtype: str) -> None:
    """Take the same steps twice and report whether weights, moments and losses are equal to the last bit."""
    from onward.config import Config

    with tempfile.TemporaryDirectory() as folder:
        base = saved_model(shape, Path(folder) / "base")
        least, most = LENGTHS[shape]
        is_anchored = method == "anchored"
        rows = {"trainable_tokens": TRAINED_ROWS} if is_anchored else {}
        config = Config.model_validate(
            {
                "model": str(base), "method": "lora" if is_anchored else method, "dtype": dtype, "max_length": most,
                "lora": {"rank": 16, "dropout": 0.1, **rows}, "warmup_steps": 0, "learning_rate": 1e-3,
                **(ANCHORED if is_anchored else {}),
            }
        )  # fmt: skip
        (first, replays, why), (second, *_) = (
            _steps(base, config, (least, most), records=records) for records in (True, False)
        )
    said = f"{replays} parts of steps replayed, then: {why}" if why else ""
    emit("twice", method=method, dtype=dtype, steps=STEPS, lengths=[least, most], equal=first == second,
         losses=[first[0][0], first[0][-1]], replays=replays, said=said)  # fmt: skip


def _steps(
    base: Path, config: Any, lengths: tuple[int, int], *, records: bool
) -> tuple[tuple[list[float], str, str], int, str]:
    """Return losses and digests of weights and moments after some steps, how many parts were replayed, and why not all
    could be.
    """
    from onward.data.tokenized import Row
    from onward.training.device.environment import pick_dtype
    from onward.training.device.execution import Execution
    from onward.training.model.load import build_model
    from onward.training.model.spec import ModelSpec
    from onward.training.model.treatment import Treatment
    from onward.training.state import Cursor, TrainState
    from onward.training.trainer import Trainer
    from onward.training.world import SingleProcess

    where = device()
    dtype = pick_dtype(config.dtype, where)
    model = build_model(ModelSpec(config, base, where, dtype), treatment=Treatment(end_to_end=True))
    state = TrainState.start(model, config)
    state.cursor = Cursor(1, "exact", 0, STEPS)
    execution = Execution(SingleProcess(where), dtype)
    trainer = Trainer(state, config, execution, _anchor(model, config, execution))
    if records:
        let_record(trainer)
    losses: list[float] = []
    for step in range(STEPS):
        source = np.random.default_rng(step)
        sizes = [lengths[0], lengths[1], *np.random.default_rng(step % SHAPES).integers(*lengths, 3)]
        rows = [Row(source.integers(3, 250, size), np.arange(size) > 0) for size in sizes]
        losses.append(trainer.take_step(batch_of(rows), endless_plan()).loss)  # type: ignore[arg-type]
    digest, learned = state.view().digest(), trainer.economy.learned
    replays, why = (learned.recorded.replays, learned.recorded.hindrance) if learned.recorded else (0, "")
    if records and where.type == "cuda" and not learned.can_record:
        why = "it cannot be recorded"
    del model, state, trainer, learned
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return (losses, digest.weights, digest.moments), replays, why


def _anchor(model: Any, config: Any, execution: Any) -> Any:
    """Return the anchor's term, of texts that the model writes now without its adapter; None if there is none."""
    from onward.data.tokenized import Row
    from onward.training.measuring.scores import Compute, Meter
    from onward.training.steps.anchor import AnchorTerm, top_of

    if not config.anchor.weight:
        return None
    base = Meter(model, Compute(config, execution)).without_adapter()
    texts = base.write((config.anchor.rows, config.anchor.tokens), 1)
    rows = [Row(np.array(text), np.arange(len(text)) > 0) for text in texts]
    found = [top_of(logits) for row in rows for batch in base.batches([row]) for logits, _ in base.logits(batch)]
    ids, logs = (torch.stack([each[kind].cpu() for each in found]) for kind in range(2))
    return AnchorTerm(rows, ids, logs, config.anchor.weight)


def _material(shape: str, folder: Path) -> tuple[Path, list[Path]]:
    base = saved_model(shape, folder / "base")
    most = min(400, LENGTHS[shape][1])
    files = [text_file(folder / f"{n}.jsonl", 16, (5, most), seed=n) for n in range(3)]
    return base, files


def _made(base: Path, root: Path) -> Path:
    """Make a run, whose model is admitted at its first start."""
    from onward import Run

    values = {"batch_size": 4, "save_steps": 3, "warmup_steps": 0, "learning_rate": 1e-3, "max_length": 512}
    Run.create(root, str(base), later=True, lora={"rank": 16, "dropout": 0.1}, **values)
    return root


def _trained(root: Path, output: Path, *files: Path, expected: int = 0, **options: Any) -> None:
    from processes import command

    status = command(output, "train", *files, "--run", root, **options)
    if status != expected:
        raise RuntimeError(f"train ended with {status}: {output.read_text()[-2000:]}")


def _same(one: Path, other: Path) -> bool:
    from states import assert_same_state

    try:
        assert_same_state(one, other)
    except AssertionError:
        return False
    return True


def files(shape: str) -> None:
    """Report whether three files in one process and in three give the same state, and whether the run's proof holds.

    What the one process measured of its last state, as a replay on a GPU, must be what the next process computes.
    """
    from processes import command

    from onward import Run

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        output = folder / "output"
        base, names = _material(shape, folder)
        whole = _made(base, folder / "whole")
        parts = Path(shutil.copytree(whole, folder / "parts"))
        with ThreadPoolExecutor(1) as beside:
            at_once = beside.submit(_trained, whole, folder / "output of all", *names)
            for name in names:
                _trained(parts, output, name)
            at_once.result()
        emit("one process and three", equal=_same(whole, parts))
        more = text_file(folder / "more.jsonl", 4, (5, 60), seed=9)
        with ThreadPoolExecutor(1) as beside:
            at_once = beside.submit(_trained, whole, folder / "output of more", more)
            status = command(output, "verify", "--deep", "--run", parts)
            at_once.result()
        handovers = [entry["handover"] for entry in Run(whole).history()]
        emit("handovers", equal=handovers == ["bitwise"] * 4, said=" ".join(handovers))
        said = "" if status == 0 else output.read_text()[-600:]
        emit("verify --deep", equal=status == 0, status=status, said=said)


def kills(shape: str) -> None:
    """Report for each instant whether the run that was killed there and continued has the undisturbed run's state."""
    import signal

    from faults import KILL, Fault, copy_run

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        output = folder / "output"
        base, names = _material(shape, folder)
        before = _made(base, folder / "before")
        _trained(before, output, names[0])
        count = folder / "count"
        undisturbed = copy_run(before, folder / "undisturbed")
        _trained(undisturbed, output, names[1], prepare=Fault(0, KILL, count))
        total = len(count.read_text().splitlines())

        def kill(instant: int) -> None:
            at = 1 + (2 * instant + 1) * total // (2 * INSTANTS)
            root = copy_run(before, folder / f"killed-{instant}")
            own = folder / f"output-{instant}"
            fault = Fault(at, KILL, folder / f"struck-here-{instant}")
            _trained(root, own, names[1], expected=-signal.SIGKILL, prepare=fault)
            known = names[1].name in _names(root)
            _trained(root, own, *(() if known else (names[1],)))
            emit("SIGKILL", instant=f"change {at} of {total} on the disk", equal=_same(undisturbed, root))

        with ThreadPoolExecutor(INSTANTS) as together:
            list(together.map(kill, range(INSTANTS)))


def _names(root: Path) -> set[str]:
    from onward import Run

    return {entry["name"] for entry in Run(root).history()}


def main() -> None:
    """Make one check."""
    what, shape = sys.argv[1:3]
    if what == "twice":
        twice(shape, *sys.argv[3:5])
        return
    import processes

    processes.IMPORTED.insert(0, "lean")
    {"files": files, "kills": kills}[what](shape)


if __name__ == "__main__":
    from onward import startup

    startup.set_environment()
    wait()
    main()
