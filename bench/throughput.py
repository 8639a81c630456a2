"""Training throughput: tokens of real rows per second, against TRL's and transformers' trainers and the machine's
limit.

Every side trains the rows of mixed length, LoRA of rank 16 on all linear layers, eight rows a step. The peers run with
each of the settings in `steps.PEERS`, and the best of them counts. The limit is the time of the matrix multiplications
that the steps cannot do without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import measuring
import steps as sides

STEPS_SCRIPT = Path(sides.__file__)
LIMIT_GOAL, TRL_GOAL, PEER_GOAL, LOSS_GOAL = 0.75, 2.0, 1.2, 1e-4
WARMUP = 1
"""How many steps are not counted."""


def measure(model: Path, rows: Path, *, steps: int, rounds: int, peers: bool = True) -> dict[str, Any]:
    """Return tokens per second of every side, and the ratios that matter.

    Args:
        model: folder of the base model.
        rows: a training file with at least `8 * steps` rows.
        rounds: times that every side is measured, in turn.
    """
    names = ["onward", "limit", *(sides.PEERS if peers else ())]
    found = measuring.interleaved(
        names, rounds, lambda side: measuring.child(STEPS_SCRIPT, side, model, rows, steps, "lora")
    )
    speeds = {side: [_speed(records) for records in every] for side, every in found.items()}
    figures: dict[str, Any] = {
        "steps": steps,
        "rounds": rounds,
        "tokens_per_second": {side: _by_step(every) for side, every in found.items()},
        "share_of_limit": measuring.held_against(LIMIT_GOAL, _ratio(speeds["onward"], speeds["limit"])),
    }
    if not peers:
        return figures
    against = {name: _ratio(speeds["onward"], speeds[name]) for name in sides.PEERS}
    best = min(ratio for name, ratio in against.items() if name.startswith("trl"))
    difference = _loss_difference(found["onward"][0], found["trl"][0])
    return {
        **figures,
        "onward_against": against,
        "against_trl_at_its_best": measuring.held_against(TRL_GOAL, best),
        "against_any_peer": measuring.held_against(PEER_GOAL, min(against.values())),
        "largest_loss_difference": measuring.held_against(LOSS_GOAL, difference, at_most=True),
    }


def _by_step(rounds: list[list[dict[str, float]]]) -> dict[str, float]:
    """Return the speed over all counted steps, of the slowest and of the fastest one."""
    counted = [record for records in rounds for record in records[WARMUP:]]
    each = [record["tokens"] / record["seconds"] for record in counted]
    whole = sum(record["tokens"] for record in counted) / sum(record["seconds"] for record in counted)
    return {"median": whole, "min": min(each), "max": max(each)}


def _speed(records: list[dict[str, float]]) -> float:
    counted = records[WARMUP:]
    return sum(record["tokens"] for record in counted) / sum(record["seconds"] for record in counted)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of each round."""
    return statistics.median([mine / other for mine, other in zip(ours, theirs, strict=True)])


def _loss_difference(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Return the largest distance between the loss curves of identical batches."""
    return max(abs(mine["loss"] - other["loss"]) for mine, other in zip(ours, theirs, strict=True))


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model's folder; the random 15M model without it")
    parser.add_argument("--data", type=Path, help="a folder with more rows (*.jsonl)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="without the peers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = arguments.model or measuring.small_llama(work / "model")
        rows = measuring.mixed_rows(work / "rows.jsonl", arguments.data, arguments.steps * 8)
        figures = measure(model, rows, steps=arguments.steps, rounds=arguments.rounds, peers=not arguments.alone)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
