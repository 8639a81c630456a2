"""What a process needs of a run before it can train: config, base model, tokenizer, device; identity checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from onward.config import Config
from onward.config.text import read_config
from onward.data.tokenizer import TokenizerState
from onward.errors import ConfigError
from onward.layout import RunLayout
from onward.service.settings import changed_refusal, locked_refusal
from onward.service.tokenizer import KeptTokenizer, tokenizer_identity
from onward.store.ledger import Ledger
from onward.text import how_many
from onward.training.admission.findings import FACT, Findings
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.checkpoint import Facts
from onward.training.device.environment import (
    pick_device,
    pick_dtype,
    ranks_facts,
    require_whole_teams,
)
from onward.training.device.execution import Execution
from onward.training.model.base import BaseDigest, base_of_run, digest_base, keep_revision
from onward.training.model.capacity import Capacity, read_capacity, require_positions
from onward.training.model.load import load_tokenizer
from onward.training.model.spec import ModelSpec, environment_of
from onward.training.model.treatment import Treatment
from onward.training.sharding.needs import require_shardable
from onward.training.steps.numerics import numerics_of
from onward.training.world import SingleProcess, World

Report = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """A run opened for work."""

    layout: RunLayout
    ledger: Ledger
    config: Config
    base: Path
    base_digest: str
    kept_tokenizer: KeptTokenizer
    tokenizer_state: TokenizerState
    world: World
    dtype: torch.dtype

    @property
    def in_shards(self) -> bool:
        """Whether the model is sharded."""
        return self.config.sharding == "full" and self.world.size > 1

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        return self.world.device

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer, loaded when first needed: training does not need it."""
        tokenizer = load_tokenizer(self.layout.tokenizer(self.base))
        if self.config.chat_template is not None:  # prompts at inference must equal those in training
            tokenizer.chat_template = self.tokenizer_state.chat_template
        return tokenizer

    @property
    def tokenizer_digest(self) -> str:
        """The fingerprint of the tokenizer."""
        return self.tokenizer_state.fingerprint

    @cached_property
    def capacity(self) -> Capacity:
        """The limits of the base model."""
        return read_capacity(self.base)

    @cached_property
    def pad_id(self) -> int:
        """A token id to fill short rows with; it is masked everywhere, so any id in the embedding would do."""
        pad_id, rows = self.tokenizer_state.pad_id, self.capacity.embedding_rows
        return pad_id if pad_id is not None and (rows is None or pad_id < rows) else 0

    @property
    def treatment(self) -> Treatment | None:
        """How the model is treated, as its admission found; None in a run that trained but was not admitted yet."""
        findings = self._findings
        return None if findings is None else findings.treatment

    @property
    def writers(self) -> tuple[str, ...] | None:
        """Types of modules that write to weights in evaluation mode, if the admission ran in this environment."""
        findings = self._findings
        return None if findings is None else findings.writers_in(self.environment)

    @property
    def _findings(self) -> Findings | None:
        return Findings.of(self.ledger.get(FACT))

    @property
    def execution(self) -> Execution:
        """Where and how steps of the run are computed."""
        treatment = self.treatment
        by_length = treatment is not None and treatment.by_length
        model = {"base": self.base_digest, "treatment": None if treatment is None else asdict(treatment)}
        return Execution(self.world, self.dtype, self.pad_id, by_length, model)

    @property
    def spec(self) -> ModelSpec:
        """What the run's model is built from."""
        return ModelSpec(self.config, self.base, self.device, self.dtype)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What bit-exactness depends on; read only after the model was admitted."""
        treatment = self.treatment
        end_to_end = None if treatment is None else treatment.end_to_end
        numerics = numerics_of(self.base, self.config, self.device, self.dtype, end_to_end=end_to_end)
        return environment_of(self.spec, numerics, ranks=ranks_facts(self.world, self.config.exchange))

    def check(self, config: Config) -> None:
        """Check a config before it comes into force against what the run was made with and how its model is laid out.

        Raises:
            ConfigError: it does not match, or rows or texts may be longer than the model's learned positions.
        """
        check_identity(self.ledger, config, self.base_digest, self.tokenizer_state)
        require_positions(self.capacity, config)
        if self.in_shards:
            require_shardable(config)

    def facts(self) -> Facts:
        """Return what every checkpoint of this session records in addition to the state."""
        return Facts(
            run=self.ledger.get("run"),
            base={"name": self.config.model, "digest": self.base_digest},
            tokenizer=self.tokenizer_digest,
            environment=self.environment,
            static_files=self._tokenizer_files(),
        )

    def _tokenizer_files(self) -> Mapping[str, bytes]:
        if self.config.chat_template is not None:  # it goes into checkpoints too
            return huggingface.tokenizer_files(self.tokenizer)
        return self.kept_tokenizer.files()


def open_session(
    layout: RunLayout,
    ledger: Ledger,
    *,
    report: Report,
    config: Config | None = None,
    begun: BaseDigest | None = None,
    world: World | None = None,
) -> Session:
    """Read the config, find base and tokenizer, and check them against what the run was made with.

    Args:
        begun: a digest that this process has begun to compute; used if it is the base's.
        world: the processes that train; None where this is the only one.

    Raises:
        ConfigError: an identity key differs from the one the run has trained with, or OpenMP's settings are wrong.
        ModelError: the base is missing or changed on disk.
    """
    config = config or read_config(layout.config)
    base = base_of_run(layout.root, config.model, report)
    base_digest = begun.result() if begun is not None and begun.folder == base else digest_base(base)
    kept = KeptTokenizer(layout, layout.tokenizer(base))
    tokenizer_state = kept.state(config, ledger)
    check_identity(ledger, config, base_digest, tokenizer_state)
    keep_revision(layout.root, config.model, base)
    world = world or SingleProcess(pick_device())
    _require_shares(config, world)
    require_whole_teams(world.device)
    dtype = pick_dtype(config.dtype, world.device)
    return Session(layout, ledger, config, base, base_digest, kept, tokenizer_state, world, dtype)


def _require_shares(config: Config, world: World) -> None:
    """Refuse more devices than a step has parts, because some would have nothing to do.

    Raises:
        ConfigError: there are more.
    """
    if world.size > config.parts:
        raise ConfigError(
            f"{world.size} devices cannot share a step of {how_many(config.parts, 'part')}",
            where="parts",
            hint=f"Set parts: {world.size} or more in onward.yaml: from the next file on, the bits of a step depend on "
            f"it and not on the number of devices. Or use {config.parts}: --devices {config.parts}",
        )


def check_identity(ledger: Ledger, config: Config, base_digest: str, tokenizer: TokenizerState) -> None:
    """Check the identity of the run against its lock; before the first commit it is only recorded.

    What an earlier release did not lock is locked as it is now.

    Raises:
        ConfigError: an identity key was changed.
        ModelError: the base model or the tokenizer changed.
    """
    digests = {"base": base_digest, **tokenizer_identity(tokenizer)}
    here = {**config.identity(), **digests}
    locked = ledger.get("identity")
    if locked is None or ledger.newest_checkpoint() is None:
        ledger.put(identity=here)
        return
    keys = config.identity_changes(locked)
    changed = [key for key, digest in digests.items() if locked.get(key, digest) != digest]
    if list(keys) == ["model"] and not changed:  # the same bits in another place
        ledger.put(identity=here)
        return
    if keys:
        raise locked_refusal(keys)
    if changed:
        thing = "base model" if "base" in changed else "tokenizer or chat template"
        raise changed_refusal(thing, config.model)
    if not digests.keys() <= locked.keys():
        ledger.put(identity={**digests, **locked})
