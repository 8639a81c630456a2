"""The config under which a run continues where a checkpoint's Trainer left off, with the source of each value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onward.config import Config, known_keys, stored_config
from onward.config.keys import IDENTITY_KEYS, NEW_RUN, SECTIONS
from onward.config.text import parse_config
from onward.errors import ConfigError, DamagedState, UsageError
from onward.layout import MANIFEST
from onward.text import quoted
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.checkpoint import Manifest, inspect_checkpoint
from onward.training.foreign.arguments import Arguments, read_arguments
from onward.training.foreign.folders import TrainerFolder, open_folder
from onward.training.foreign.moments import Moments, read_moments
from onward.training.foreign.schedules import TrainerSchedule, read_schedule, require_schedule
from onward.training.foreign.settings import argument_settings, optimizer_arguments
from onward.training.model.adapter_config import adapter_settings, read_adapter
from onward.training.model.base import ADAPTER_CONFIG

SCHEDULE_SOURCE = "schedule of the Trainer"
WHOLE_MODEL = "the model's files"
NEW_SCHEDULE: dict[str, Any] = {"warmup_steps": 0}
"""What holds if the user sets a schedule: the run does not begin, it continues."""


@dataclass(frozen=True)
class Adopted:
    """What a checkpoint becomes.

    Args:
        moments: its optimizer's state; None if it starts afresh.
        schedule: the Trainer's; None for a checkpoint of Onward's own, which records more.
        sources: config values by their source.
        adapter: the adapter's config; empty for a full model.
        base_digest: that of the base, if Onward wrote the checkpoint.
    """

    folder: TrainerFolder
    config: Config
    arguments: Arguments
    moments: Moments | None
    schedule: TrainerSchedule | None
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    adapter: Mapping[str, Any] = field(default_factory=dict[str, Any])
    base_digest: str = ""

    @property
    def revision(self) -> str | None:
        """The revision of its base on the hub that an adapter names, if the run's base is the one that it names."""
        is_its_own = self.config.model == self.adapter.get("base_model_name_or_path")
        return self.adapter.get("revision") if is_its_own else None


def read_adopted(checkpoint: Path, model: str | None, settings: Mapping[str, Any], *, fresh: bool) -> Adopted:
    """Read what a checkpoint says about how it was trained; `settings` take precedence.

    Raises:
        UsageError, ModelError: it cannot be continued exactly.
        DamagedState: one of its files does not contain what it should.
        ConfigError: the settings contradict the checkpoint.
    """
    folder = open_folder(checkpoint, fresh=fresh)
    manifest = _own_manifest(checkpoint, fresh=fresh)
    arguments = Arguments(missing=f"{MANIFEST} says more") if manifest else read_arguments(checkpoint)
    adapter = read_adapter(checkpoint) if (checkpoint / ADAPTER_CONFIG).is_file() else {}
    moments = None if fresh else read_moments(folder, arguments, one_rate="learning_rate" in settings)
    sources: dict[str, Mapping[str, Any]] = {}
    schedule = None
    if manifest is not None:
        sources[MANIFEST] = _recorded(manifest)
    else:
        optimizer = moments.settings() if moments else optimizer_arguments(arguments)
        sources[huggingface.OPTIMIZER if moments else huggingface.TRAINING_ARGUMENTS] = optimizer
        schedule = read_schedule(folder, arguments, float(optimizer.get("learning_rate", 0.0)))
        sources[SCHEDULE_SOURCE] = _schedule_values(schedule, folder, settings, fresh=fresh)
        merged = {**sources.get(huggingface.TRAINING_ARGUMENTS, {}), **argument_settings(folder, arguments)}
        sources[huggingface.TRAINING_ARGUMENTS] = merged
    if adapter:
        method = stored_config(manifest.config).method if manifest else "lora"  # the base may be in 4 bits
        sources[ADAPTER_CONFIG] = {"method": method, **adapter_settings(adapter)}
    else:
        sources[WHOLE_MODEL] = {"method": "full"}  # it is its own base
    named = adapter.get("base_model_name_or_path") if adapter else str(checkpoint.absolute())
    config = _merge(sources, model or named or "", settings, checkpoint)
    digest = manifest.base["digest"] if manifest else ""
    return Adopted(folder, config, arguments, moments, schedule, sources, adapter, digest)


def _merge(sources: Mapping[str, Mapping[str, Any]], model: str, settings: Mapping[str, Any], where: Path) -> Config:
    values = {key: value for source in sources.values() for key, value in source.items()}
    if not (model or settings.get("model")):
        raise UsageError("the checkpoint does not name its base model", where=where, hint="--model NAME_OR_PATH")
    values = {**values, "model": model or settings["model"]}
    config = parse_config({**NEW_RUN, **values, **settings}, where=where)
    shape = {key: value for key, value in values.items() if key == "model" or _is_shape(key)}
    _require_shape(parse_config(shape, where=where), config)
    return config


def _is_shape(key: str) -> bool:
    """Whether a key had its effect when the run was made: it is in the checkpoint's weights, tokenizer and base."""
    return key in ("method", "tokens", "adapter") or key.startswith("lora.")


def _require_shape(saved: Config, config: Config) -> None:
    """Refuse settings that ask for another shape than the checkpoint's; under an adapter, a base may be in 4 bits."""
    asked = {key: there for key, (_, there) in saved.differences(config).items() if key in IDENTITY_KEYS}
    refused = {key: asked[key] for key in asked if _is_shape(key)}
    if "full" not in (saved.method, config.method):
        refused.pop("method", None)
    if refused:
        words = ", ".join(f"{key}={value}" for key, value in refused.items())
        raise ConfigError(f"the checkpoint has a different shape from {words}", where="--set", hint="Leave these out.")


def _schedule_values(
    schedule: TrainerSchedule, folder: TrainerFolder, settings: Mapping[str, Any], *, fresh: bool
) -> Mapping[str, Any]:
    if "schedule" in settings:
        return NEW_SCHEDULE
    if fresh and not schedule.name:  # nothing says how it was trained: warm up again
        return {"schedule_offset": folder.step}
    return require_schedule(schedule, folder)


def _own_manifest(checkpoint: Path, *, fresh: bool) -> Manifest | None:
    """Return the manifest of a checkpoint that Onward wrote, which records what a Trainer's does not; else None.

    Raises:
        DamagedState: it, or a file that would be read, is not as Onward wrote it.
    """
    if not (checkpoint / MANIFEST).exists():
        return None
    left_out = {huggingface.RNG, huggingface.SCHEDULER, huggingface.TRAINING_ARGUMENTS}
    found = inspect_checkpoint(checkpoint, left_out | ({huggingface.OPTIMIZER} if fresh else set()))
    if found.problems:
        raise DamagedState(
            f"Onward wrote this checkpoint, and it has changed since: {'; '.join(found.problems)}",
            where=checkpoint,
            hint="Adopt another checkpoint of the run. To take this one for a Trainer's, whatever it holds now: "
            f"rm {quoted(checkpoint / MANIFEST)}; then adopt again.",
        )
    return found.manifest


def _recorded(manifest: Manifest) -> dict[str, Any]:
    """Return the config that a checkpoint of Onward's own was trained under, without its base and its adapter.

    Its chat template is the one of the checkpoint's tokenizer: the config names a file of that run.
    """
    flat = stored_config(manifest.config).flat()
    apart = ("model", "chat_template")
    left = {key for key in known_keys() if key in apart or _is_shape(key) or key.partition(".")[0] == "notify"}
    return {key: value for key, value in flat.items() if key not in left | set(SECTIONS) and value is not None}
