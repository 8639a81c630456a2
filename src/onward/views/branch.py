"""A branch of the run in memory: the state of a boundary, averaged or cooled down, for a release.

It is based on a copy of the run, so that the run is untouched while its owner continues to train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from onward.config import Config, stored_config
from onward.data.plan.cooldown import CooldownPlan
from onward.data.tokenized import TokenizedFile
from onward.errors import UsageError
from onward.events import Observe
from onward.layout import RunLayout
from onward.service.intake.tokens import open_tokens
from onward.service.knowledge.evaluation import Evaluation
from onward.service.knowledge.plans import first_in_stream, sources_of
from onward.service.session import Session, open_session
from onward.service.state.reading import verified_point
from onward.store.ledger import Ledger
from onward.training.boundary import cross_boundary
from onward.training.checkpoints.checkpoint import Manifest
from onward.training.checkpoints.loading import load_state
from onward.training.schedule import cooling
from onward.training.state import TrainState
from onward.training.trainer import Trainer


@dataclass
class Branch:
    """A state of the run that is developed independently.

    Args:
        session: the copy of the run, opened.
        manifest: the manifest of the boundary it begins at.
        config: the config that was in force there.
        state: what evolves.
    """

    session: Session
    manifest: Manifest
    config: Config
    state: TrainState

    @classmethod
    def at(cls, copy: RunLayout, ledger: Ledger, step: int, report: Callable[[str], None]) -> Branch:
        """Load the state of a boundary of a copied run.

        Raises:
            DamagedState: it does not verify.
        """
        session = open_session(copy, ledger, report=report)
        manifest = verified_point(copy.boundary(step))
        config = stored_config(manifest.config)
        return cls(session, manifest, config, _load(session, copy, manifest, config))

    def average(self, layout: RunLayout, steps: Sequence[int]) -> None:
        """Replace the trained weights by their mean over boundaries of the run, computed in float64.

        Stochastic weight averaging, from Izmailov et al. ("Averaging Weights Leads to Wider Optima and Better
        Generalization", 2018). The matrices of an adapter are averaged one by one.

        Args:
            layout: the run, whose restore points are read.
            steps: the steps of the boundaries, with or without this branch's own.

        Raises:
            DamagedState: one of them does not verify.
        """
        sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in self.state.parameters.items()}
        for step in steps:
            manifest = verified_point(layout.boundary(step))
            other = _load(self.session, layout, manifest, stored_config(manifest.config))
            for name, weight in other.parameters.items():
                sums[name] += weight.detach()
        with torch.no_grad():
            for name, weight in self.state.parameters.items():
                weight.copy_(sums[name] / len(steps))

    def cool(self, steps: int, observe: Observe, stop: Callable[[], None]) -> float:
        """Train on rows of the whole stream while the learning rate decays to zero; return the rate at the start.

        The loss is that of the run, with the anchor's term if that has a weight.

        Args:
            stop: called after each step; may raise to give up.

        Raises:
            UsageError: no row of the stream may be trained.
        """
        state, config = self.state, self.config
        files = sources_of(self.session.ledger, config)
        if not files:
            raise UsageError(
                "nothing has been trained yet that a cooldown could take rows from", hint="onward train FILE"
            )
        peak = state.learning_rate
        plan = CooldownPlan(files, config.batch_size, steps, f"{config.seed}:{self.manifest.state_digest}:{steps}")
        tokens = {sha256: self._open(sha256, stop) for sha256 in sorted(plan.needed)}
        cross_boundary(state, config.model_copy(update={"boundary": "carry"}), plan, state.cursor.position + 1)
        anchor = Evaluation(self.session, stop).anchor_term(state.model, config)
        trainer = Trainer(state, config, self.session.execution, anchor, rates=partial(_rate, peak, steps))
        for result in trainer.steps(tokens, plan):
            observe(result)
            stop()
        return peak

    def _open(self, sha256: str, stop: Callable[[], None]) -> TokenizedFile:
        row = first_in_stream(self.session.ledger, sha256)
        return open_tokens(self.session, row, stored_config(self.session.ledger.config_of(row)), stop)


def _rate(peak: float, steps: int, _step: int, step_in_file: int) -> float:
    return cooling(peak, step_in_file, steps)


def _load(session: Session, layout: RunLayout, manifest: Manifest, config: Config) -> TrainState:
    spec = replace(session.spec, config=config)
    return load_state(layout.boundary(manifest.step), manifest, spec, treatment=session.treatment)
