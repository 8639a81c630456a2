"""What rank 0 tells the others, as JSON values: the file that begins, the next step, to free the model, the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from onward.config import Config
from onward.data.plan.order import FilePlan, Plan
from onward.data.plan.replay import ReplayPlan, Source
from onward.data.tokenized import TokenizedFile
from onward.training.device.execution import Execution
from onward.training.model.adapter import adapter_message
from onward.training.state import TrainState
from onward.training.steps.anchor import AnchorTerm
from onward.training.world import Message

FILE, STEP, RELEASE, END = "file", "step", "release", "end"
LOAD, MEASURE, COMMIT = "load", "measure", "commit"
"""Kinds of orders."""


def file_order(
    state: TrainState,
    config: Config,
    execution: Execution,
    plan: Plan,
    files: Mapping[str, TokenizedFile],
    anchor: AnchorTerm | None,
) -> Message:
    """Return what another rank needs to take the steps of a file, apart from the state and the anchor's tensors."""
    return {
        "order": FILE,
        "config": config.recorded(),
        "dtype": str(execution.dtype).removeprefix("torch."),
        "pad_id": execution.pad_id,
        "by_length": execution.by_length,
        "model": execution.model,
        "adapter": adapter_message(state.model),
        "state": state.view().plain(),
        "plan": plan_message(plan),
        "tokens": {sha256: file.directory.name for sha256, file in files.items()},
        "anchor": None if anchor is None else {"weight": anchor.weight, "shape": list(anchor.ids.shape)},
    }


def step_order(recomputation: str) -> Message:
    """Return what another rank needs to take the next step: the current value of `activation_checkpointing`."""
    return {"order": STEP, "recomputation": recomputation}


def plan_message(plan: Plan) -> Message:
    """Return a plan as JSON values."""
    if isinstance(plan, ReplayPlan):
        return {
            "own": asdict(plan.own),
            "earlier": [asdict(source) for source in plan.earlier],
            "share": plan.share,
            "weighted": plan.weighted,
            "key": plan.key,
        }
    assert isinstance(plan, FilePlan), type(plan)
    return {"own": asdict(plan)}


def plan_told(told: Mapping[str, Any]) -> FilePlan | ReplayPlan:
    """Return the plan that a message describes."""
    own = FilePlan(**_with_tuple(told["own"]))
    if "earlier" not in told:
        return own
    earlier = tuple(Source(**_with_tuple(source)) for source in told["earlier"])
    return ReplayPlan(own, earlier, told["share"], told["weighted"], told["key"])


def _with_tuple(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "held_out": tuple(values["held_out"])}
