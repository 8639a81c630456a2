"""The config of a run: its keys, what they may be, and when a change of each acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

IDENTITY_KEYS = ("model", "method", "lora.rank", "lora.alpha", "lora.targets", "seed", "dtype")
"""Keys that make a run what it is: locked once it has trained a step."""

SECTIONS = ("lora", "notify")
"""Keys that have keys of their own."""

OPERATION_KEYS = (
    "save_steps", "log_steps", "keep_boundaries", "keep_days", "settle_seconds", "retries", "disk_margin_mb",
    "compress_archive", "notify",
    "max_row_mb", "max_unpacked_mb", "max_unpack_ratio",
)  # fmt: skip
"""Keys that no weight depends on: they act at once, also in a process that runs."""

SECRET_KEYS = ("notify.command", "notify.url")
"""Keys that may hold a password or a token: their values stand in the config file and nowhere else."""

HORIZON_SCHEDULES = ("cosine", "linear")
"""Schedules that need `total_steps`."""


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)]
Index = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0.0, lt=1.0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(_Section):
    """The adapter; ignored for `method: full`."""

    rank: Count = Field(default=16, description="Rank of the two adapter matrices.")
    alpha: Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0.0, allow_inf_nan=False)] = Field(
        default=32.0, description="Scale: the adapter's output is multiplied by alpha / rank."
    )
    dropout: Fraction = Field(default=0.05, description="Dropout on the adapter's input while training.")
    targets: str | list[str] = Field(
        default="all-linear",
        description="Module names that get an adapter, or `all-linear` (every linear layer but the head).",
    )

    @model_validator(mode="after")
    def _targets_named(self) -> Self:
        if not self.targets:
            raise ValueError("lora.targets is empty: name modules, or use all-linear")
        return self


MICRO_BATCH_TOKENS = 8192
"""Tokens of a part of a step under `gradient_accumulation: auto`. The last bits of a step depend on it."""


class NotifyConfig(_Section):
    """Who is notified of events while a process trains; nobody unless named here."""

    command: Annotated[str, Field()] = Field(
        default="", description="A program and its arguments; it gets the event as JSON on its standard input."
    )
    url: Annotated[str, Field(pattern=r"^(https?://.+)?$")] = Field(
        default="", description="A webhook: the event is posted to it as JSON."
    )
    events: list[Literal["done", "rejected", "failed", "paused"]] = Field(
        default=["rejected", "failed", "paused"], description="What to tell of: done, rejected, failed, paused."
    )


class Config(_Section):
    """Every setting of a run. Identity keys are locked by fingerprint; the others change at the next boundary."""

    model: Annotated[str, Field(min_length=1)] = Field(
        default="smollm2-135m", description="`smollm2-135m` (embedded), a Hugging Face name, or a path to a causal LM."
    )
    method: Literal["lora", "full", "qlora"] = Field(
        default="lora",
        description="Train an adapter, all weights, or an adapter on a 4-bit base (needs `onward[qlora]`).",
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="The adapter.")
    seed: Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, lt=2**63)] = Field(
        default=0, description="All randomness is a function of it: adapter initialization, order of rows, dropout."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Compute type; trained weights are float32. `auto`: bfloat16 on a GPU that has it, else float32.",
    )
    max_length: Annotated[int, BeforeValidator(_refuse_bool), Field(ge=2)] = Field(
        default=1024, description="Tokens of a row at most."
    )
    over_length: Literal["truncate", "drop", "reject"] = Field(
        default="truncate",
        description="What becomes of a longer row: cut at the end, left out, or the file is rejected.",
    )
    batch_size: Count = Field(default=8, description="Rows of one optimizer step.")
    gradient_accumulation: Literal["auto"] | Count = Field(
        default="auto",
        description="Parts into which the rows of a step are cut to save memory; the step stays the same. "
        f"`auto`: as few as have at most {MICRO_BATCH_TOKENS} tokens (with the filling, where rows are padded), "
        "or one row.",
    )
    epochs: Count = Field(default=1, description="Times that every row of a file is trained.")
    learning_rate: Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0.0, allow_inf_nan=False)] = Field(
        default=2e-4, description="Peak learning rate."
    )
    schedule: Literal["constant", "inverse_sqrt", "wsd", "cosine", "linear"] = Field(
        default="constant",
        description="Learning rate as a function of the step; `cosine` and `linear` need `total_steps`.",
    )
    warmup_steps: Index = Field(default=10, description="Steps of linear warmup at the start of the run.")
    total_steps: Count | None = Field(
        default=None, description="Horizon of `cosine` and `linear`: the step at which `min_learning_rate` is reached."
    )
    min_learning_rate: Rate = Field(
        default=0.0, description="Learning rate below which no schedule falls after warmup."
    )
    weight_decay: Rate = Field(default=0.0, description="AdamW's decoupled weight decay (not on biases and norms).")
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.999), description="AdamW's decay rates of the two moments."
    )
    max_grad_norm: Rate = Field(
        default=1.0, description="Gradient norm above which gradients are scaled down; 0 is off."
    )
    save_steps: Count = Field(
        default=100, description="Steps between commits inside a file; a boundary, a stop and a signal always commit."
    )
    log_steps: Count = Field(default=10, description="Steps between lines of progress and entries of `log_history`.")
    keep_boundaries: Count = Field(
        default=5, description="Restore points kept at earlier file boundaries, besides the newest."
    )
    keep_days: Index = Field(
        default=7, description="Days back for which the last restore point of each day is kept too; 0 is off."
    )
    settle_seconds: Rate = Field(
        default=3.0, description="Seconds that a file in the inbox must stand still before it is taken."
    )
    retries: Index = Field(
        default=1, description="Times that a daemon trains a file again that failed, before it is quarantined."
    )
    disk_margin_mb: Index = Field(
        default=4, description="Free megabytes, beyond the next checkpoint, below which training pauses."
    )
    compress_archive: bool = Field(
        default=False, description="Keep the originals of finished files compressed (zstd); text formats only."
    )
    max_row_mb: Count = Field(
        default=16, description="Megabytes of a row, in the file and as it is tokenized, above which a file is refused."
    )
    max_unpacked_mb: Count = Field(
        default=65536, description="Megabytes that a compressed or Parquet file may unpack to; above, it is refused."
    )
    max_unpack_ratio: Count = Field(
        default=200,
        description="Times its size that a compressed or Parquet file may unpack to; judged above 16 megabytes.",
    )
    notify: NotifyConfig = Field(default=NotifyConfig(), description="Who is notified of events.")
    boundary: Literal["carry", "reset_moments", "rewarm"] = Field(
        default="carry",
        description="What happens to the optimizer between files: all goes on, moments restart, or warmup again.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.schedule in HORIZON_SCHEDULES:
            if self.total_steps is None:
                raise ValueError(f"schedule {self.schedule} needs total_steps; constant, inverse_sqrt and wsd do not")
            if self.total_steps <= self.warmup_steps:
                raise ValueError(f"total_steps {self.total_steps} is not above warmup_steps {self.warmup_steps}")
        return self

    @property
    def most_parts(self) -> int:
        """Parts into which a step is cut at most."""
        if self.gradient_accumulation != "auto":
            return self.gradient_accumulation
        return min(self.batch_size, -(-self.batch_size * self.max_length // MICRO_BATCH_TOKENS))

    def flat(self) -> dict[str, Any]:
        """Return every setting by dotted key, as JSON values."""
        values = self.model_dump(mode="json")
        sections = {name: cast(dict[str, Any], values.pop(name)) for name in SECTIONS}
        inner = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        return {**values, **inner}

    def recorded(self) -> dict[str, Any]:
        """Return the config as manifests, the ledger and events may show it: JSON values without the secret keys."""
        values = self.model_dump(mode="json")
        for key in SECRET_KEYS:
            section, _, name = key.partition(".")
            del values[section][name]
        return values

    def training(self) -> dict[str, Any]:
        """Return the settings that a step's result depends on, by dotted key."""
        return {key: value for key, value in self.flat().items() if key.partition(".")[0] not in OPERATION_KEYS}

    def with_operation_keys_of(self, other: Config) -> Config:
        """Return this config with the keys that act at once taken from another."""
        return self.model_copy(update={key: getattr(other, key) for key in OPERATION_KEYS})

    def identity(self) -> dict[str, Any]:
        """Return the identity keys with their values; the adapter's only where there is an adapter."""
        flat = self.flat()
        return {key: flat[key] for key in IDENTITY_KEYS if self.method != "full" or not key.startswith("lora.")}

    def differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Return `{key: (value here, value in other)}` for every key that differs, except the secret ones."""
        here, there = self.flat(), other.flat()
        return {key: (here[key], there[key]) for key in here if here[key] != there[key] and key not in SECRET_KEYS}


Acts = Literal["never", "at the next file", "at once"]


def acts(key: str) -> Acts:
    """Say when a change of a key takes effect in a run that has trained: the one table of that."""
    if key in IDENTITY_KEYS:
        return "never"
    return "at once" if key.partition(".")[0] in OPERATION_KEYS else "at the next file"


SECTION_FIELDS = {"lora": frozenset(LoraConfig.model_fields), "notify": frozenset(NotifyConfig.model_fields)}


def known_keys() -> list[str]:
    """Return every dotted key that a config may have."""
    return list(Config().flat())


def stored_config(values: Mapping[str, Any]) -> Config:
    """Return a config that a manifest or the ledger kept: keys that this release no longer has are left out.

    What a run was trained with is a fact, so it is not judged by what today's keys allow.
    """
    known = {name: values[name] for name in Config.model_fields if name in values}
    for name in SECTIONS:
        if isinstance(known.get(name), Mapping):
            fields = SECTION_FIELDS[name]
            known[name] = {key: value for key, value in known[name].items() if key in fields}
    return Config.model_validate(known)
