"""Every causal family of the installed transformers, small and random, through `init` and two files: a table.

    make families                             all of them (about half an hour on one core), into docs/families.md
    python tests/families.py llama mamba      some of them, onto the terminal; --write: into the page too

Each family is a process of its own, with a limit of time. A family either trains with the default settings, its state
proven by `verify --deep`, or is refused by `init` in a line that names what to set; that setting is tried too.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "families.md"
METHODS = ("lora", "full")
LIMIT = 300.0
"""Seconds that a family may take with one method."""
SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "max_length": 128,
    "batch_size": 4,
    "warmup_steps": 2,
    "log_steps": 1,
}


@dataclass(frozen=True)
class Result:
    """What came of one family with one method.

    Args:
        outcome: `trains`, `refused`, `not made` (no small model of it), or `FAILED` (what must not happen).
        detail: how its rows are laid, or the line of the refusal.
        left_out: what no gradient reaches.
        unreached: stacked weights without an adapter.
        reach: share of the weights that are trained or have an adapter.
        settings: what was set because the default does not work.
    """

    outcome: str
    detail: str
    left_out: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    reach: float = 0.0
    settings: str = ""


def try_family(family: str, method: str, folder: Path, **settings: Any) -> Result:
    """Make a small model of a family, a run of it, and train two files in two openings of the run.

    Args:
        settings: config keys in addition to the defaults.
    """
    import small
    import tiny
    import torch

    try:
        model = small.small_model(family)
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(20)[None], use_cache=False)
        model.save_pretrained(folder / "model")
    except Exception as error:
        return Result("not made", _short(error))
    tiny.byte_tokenizer().save_pretrained(folder / "model")
    return train_family(folder, method, **settings)


def train_family(folder: Path, method: str, **settings: Any) -> Result:
    """Train the model in `folder / "model"` on two files."""
    import tiny

    from onward import Run
    from onward.errors import OnwardError
    from onward.store.ledger import Ledger
    from onward.training.admission.findings import FACT, Findings, named

    root = folder / f"run-{method}"
    try:
        Run.create(root, str(folder / "model"), method=method, **{**SETTINGS, **settings})
    except OnwardError as error:
        return Result("refused", f"{error.what} — {' '.join((error.hint or '').split())}".replace(str(folder), ""))
    for number in (1, 2):
        rows = tiny.write_jsonl(folder / f"{number}.jsonl", tiny.chat_rows(8, seed=number))
        try:
            Run(root).train(rows)
        except OnwardError as error:
            return Result("FAILED", error.what)
    proof = Run(root).verify(deep=True)
    if not proof.ok:
        return Result("FAILED", "; ".join(check.detail for check in proof.checks if not check.ok))
    with Ledger(Run(root).layout.ledger, read_only=True) as ledger:
        found = Findings.of(ledger.get(FACT))
    assert found is not None
    changed = ", ".join(f"{key}: {value:g}" for key, value in found.settings.items())
    unreached = (named(found.unreached, 2),) if found.unreached else ()
    left_out = (named(found.left_out, 2),) if found.left_out else ()
    return Result("trains", found.rows, left_out, unreached, found.reach, changed)


def _short(error: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip()[:120]


def _in_process(family: str, method: str) -> Result:
    """Try a family in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, method, theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(LIMIT):
            return Result("FAILED", f"took more than {LIMIT:.0f} s")
        return Result(**{key: tuple(v) if isinstance(v, list) else v for key, v in mine.recv().items()})
    except EOFError:
        return Result("FAILED", "its process died")
    finally:
        process.kill()
        process.join()


def _child(family: str, method: str, pipe: Any) -> None:
    with Path(os.devnull).open("w") as nothing, tempfile.TemporaryDirectory() as folder:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        try:
            result = try_family(family, method, Path(folder))
        except Exception as error:
            result = Result("FAILED", _short(error))
        pipe.send(asdict(result))


def sweep(families: list[str], jobs: int) -> Iterator[tuple[str, dict[str, Result]]]:
    """Yield each family with its results by method, in order."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(
            families, pool.map(lambda name: {m: _in_process(name, m) for m in METHODS}, families), strict=True
        )


def row(family: str, results: dict[str, Result]) -> str:
    """Return a row of the table."""
    lora, full = results["lora"], results["full"]
    return f"| {family} | {_cell(lora, adapter=True)} | {_cell(full, adapter=False)} |"


def _cell(result: Result, *, adapter: bool) -> str:
    if result.outcome != "trains":
        return f"**{result.outcome}**: {result.detail}".replace("|", "\\|")
    parts = [f"trains, {result.detail}"]
    if adapter:
        parts.append(f"reaches {result.reach:.0%}")
    parts += [f"left out: {name}" for name in result.left_out]
    parts += [f"no adapter: {name}" for name in result.unreached]
    return "; ".join([*parts, *([f"set: {result.settings}"] if result.settings else [])])


def written() -> dict[str, str]:
    """Return the rows of the page as it stands, by family."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| family ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


def page(rows: list[str]) -> str:
    """Return the page of the documentation."""
    import peft
    import torch
    import transformers

    head = (HERE / "families_page.md").read_text(encoding="utf-8")
    versions = f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__}"
    lora = [line.split(" | ")[1] for line in rows]
    words = {"train": "trains", "are refused": "**refused**", "could not be made": "**not made**", "FAIL": "**FAILED**"}
    counts = {name: sum(cell.startswith(start) for cell in lora) for name, start in words.items()}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    table = "\n".join(["| family | LoRA, default settings | all weights (`method: full`) |", "|---|---|---|", *rows])
    return f"{head.format(versions=versions, summary=summary, families=len(rows))}\n{table}\n"


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="names; all if none is given, and then the page is written")
    parser.add_argument("--write", action="store_true", help="put the rows of the named families into the page")
    parser.add_argument("--jobs", type=int, default=1, help="families tried at once")
    arguments = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import small
    import torch

    import onward.service.owner.daemon  # noqa: F401  # forked processes have it already

    torch.set_num_threads(1)
    rows = written() if arguments.write and arguments.families else {}
    counts: dict[str, int] = {}
    begun = time.perf_counter()
    for family, results in sweep(arguments.families or small.causal_families(), arguments.jobs):
        rows[family] = row(family, results)
        counts[results["lora"].outcome] = counts.get(results["lora"].outcome, 0) + 1
        print(rows[family], flush=True)
    if arguments.write or not arguments.families:
        PAGE.write_text(page([rows[name] for name in sorted(rows)]), encoding="utf-8")
    print(f"{counts} in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    sys.exit(1 if counts.get("FAILED") else 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
