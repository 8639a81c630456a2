"""Where a process continues from: the state of the newest checkpoint, or that of step 0. Nothing is written."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.config import Config, stored_config
from onward.service.admission import admit_at_start
from onward.service.session import Session
from onward.service.state.own_parts import start_folder
from onward.service.state.settle import Settled
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.checkpoint import Manifest
from onward.training.checkpoints.loading import load_state
from onward.training.model.load import build_model
from onward.training.state import TrainState

if TYPE_CHECKING:
    from onward.service.owner.training.sharded import ShardedRun

Log = deque[dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """A loaded state.

    `manifest` is its checkpoint's, or None for the state of step 0. `config` was in force when it was committed.
    """

    state: TrainState
    manifest: Manifest | None
    config: Config
    log: Log
    in_shards: ShardedRun | None = None
    """The run's model if it is sharded."""


def load_start(session: Session, settled: Settled, *, proves_again: bool = True) -> Start:
    """Load the state that settling found, or make the state of step 0.

    Args:
        proves_again: whether the model is proven again if it was proven with other libraries or on another device.

    Raises:
        DamagedState: the checkpoint is not what its manifest says.
        ModelError: the base model cannot be loaded or, before the first step, not be proven.
    """
    log: Log = deque(maxlen=huggingface.LOG_TAIL)
    if settled.folder is None or settled.manifest is None:
        start = start_folder(session.layout, session.ledger, session.config)
        admit_at_start(session, has_trained=False, again=proves_again, start=start)
        run = _in_shards(session, session.config, start, None)
        if run is not None:
            return Start(run.held.state, None, session.config, log, run)
        model = build_model(session.spec, checkpoint=start, treatment=session.treatment)
        return Start(TrainState.start(model, session.config), None, session.config, log)
    admit_at_start(session, has_trained=True, again=proves_again)
    manifest = settled.manifest
    config = stored_config(manifest.config)
    loaded = session.config if manifest.cursor.at_boundary else config
    run = _in_shards(session, loaded, settled.folder, manifest)
    spec = replace(session.spec, config=loaded)
    state = run.held.state if run else load_state(settled.folder, manifest, spec, treatment=session.treatment)
    log.extend(json.loads((settled.folder / huggingface.TRAINER_STATE).read_bytes())["log_history"])
    return Start(state, manifest, config, log, run)


def _in_shards(session: Session, config: Config, folder: Path | None, manifest: Manifest | None) -> ShardedRun | None:
    """Return the run's sharded model, if it should be sharded; what that needs is imported only then."""
    if not session.in_shards:
        return None
    from onward.service.owner.training.sharded import load_in_shards

    return load_in_shards(session, config, folder, manifest)
