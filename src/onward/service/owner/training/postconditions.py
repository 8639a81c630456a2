"""What must hold when a file is done, by counting what was trained, not by what was planned."""

from __future__ import annotations

from onward.data.plan.replay import StreamPlan
from onward.errors import TrainingError
from onward.store.ledger import Ledger
from onward.training.state import TrainState


def require_done(ledger: Ledger, state: TrainState, file_id: int, plan: StreamPlan) -> None:
    """Check a file against its plan: steps and rows as counted in the ledger, and the optimizer's own counter.

    Raises:
        TrainingError: it was not trained as planned.
    """
    counted = ledger.count_trained(file_id)
    counters = state.counters
    expected = (plan.steps, plan.trained_rows * plan.epochs)
    if counted != expected:
        raise _broken(f"(steps, rows) should be {expected}, the ledger counted {counted}")
    adam_step = state.view().adam_step()
    if adam_step != counters.step - counters.adam_origin:
        raise _broken(f"Adam counts {adam_step} steps, the run {counters.step - counters.adam_origin}")


def _broken(reason: str) -> TrainingError:
    return TrainingError(
        f"the file was not trained as planned: {reason}", hint="It was not committed as done. onward verify"
    )
