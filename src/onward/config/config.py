"""The config of a run: its keys, what they may be, and when a change of each acts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from onward.config import keys
from onward.config.sections import (
    RESIDUAL_INITS,
    AnchorConfig,
    Columns,
    Count,
    EvaluationConfig,
    Factor,
    Fraction,
    GuardConfig,
    Index,
    LoraConfig,
    Name,
    NotifyConfig,
    PathText,
    Rate,
    ReplayConfig,
    Section,
    TextConfig,
    Tracker,
    on_or_off,
    path_text,
    refuse_bool,
    refuse_twice,
)


class Config(Section):
    """Every setting of a run. Identity keys are locked by fingerprint; the others change at the next boundary."""

    model: PathText = Field(
        default="smollm2-135m", description="`smollm2-135m` (built in), a Hugging Face name, or a path to a causal LM."
    )
    method: Literal["lora", "full", "qlora"] = Field(
        default="lora",
        description="Train an adapter, all weights, or an adapter on a 4-bit base (needs `onward[qlora]`).",
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="The adapter.")
    adapter: Annotated[str, BeforeValidator(path_text)] = Field(
        default="",
        description="A PEFT LoRA adapter whose weights the run starts from, kept in `adapter/`. See `init --adapter`.",
    )
    tokens: list[Name] = Field(
        default=[],
        description="Tokens added to the vocabulary when the run is made; their rows are trained. The run keeps the "
        "extended base and its tokenizer in `base/`.",
    )
    train: list[Name] = Field(
        default=[],
        description="For `method: full`: train only weights whose names match one of these regular expressions.",
    )
    seed: Annotated[int, BeforeValidator(refuse_bool), Field(ge=0, lt=2**63)] = Field(
        default=0, description="All randomness is a function of it: adapter initialization, order of rows, dropout."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Compute type; trained weights are float32. `auto`: bfloat16 on a GPU that has it, else float32. "
        "`float16`, for GPUs without bfloat16, scales the loss.",
    )
    deterministic: bool = Field(
        default=True,
        description="Compute only with operations that give the same bits every time. `false` allows others; "
        "handovers then say `not deterministic` instead of `bitwise`.",
    )
    chat_template: PathText | None = Field(
        default=None,
        description="Chat template instead of the tokenizer's own: a .jinja file, of which the run keeps a copy, or "
        "the name of a training template that TRL ships, such as `qwen3_training` (needs `onward[templates]`).",
    )
    max_length: Annotated[int, BeforeValidator(refuse_bool), Field(ge=2)] = Field(
        default=1024, description="Maximum number of tokens of a row."
    )
    over_length: Literal["auto", "truncate", "drop", "reject"] = Field(
        default="truncate",
        description="What happens to a longer row: it is cut at the end or left out, or its file is rejected; `auto` "
        "splits plain text into several rows without loss and cuts other rows. `onward init` writes `auto`.",
    )
    columns: Columns = Field(
        default={},
        description="Columns to read as keys of a row format: `{prompt: question, completion: answer}`.",
    )
    text: TextConfig = Field(default=TextConfig(), description="How a `.txt` file is read.")
    bad_rows: Literal["reject", "drop"] = Field(
        default="reject",
        description="What happens to a row that cannot be trained: its file is rejected, or it is left out and named.",
    )
    bad_rows_share: Annotated[float, BeforeValidator(refuse_bool), Field(gt=0.0, le=1.0, allow_inf_nan=False)] = Field(
        default=0.05,
        description="Share of a file's rows that `bad_rows: drop` may leave out; applies above 10 such rows, or if "
        "they are half of the file.",
    )
    batch_size: Count = Field(default=8, description="Rows per optimizer step.")
    gradient_accumulation: Literal["auto"] | Count = Field(
        default="auto",
        description="Parts into which the rows of a step are divided to save memory; the step stays the same. "
        "`auto`: as few as possible, each of one row or of at most `micro_batch_tokens` tokens (padding included).",
    )
    micro_batch_tokens: Literal["auto"] | Count = Field(
        default="auto",
        description="Maximum number of tokens of such a part. The last bits of a step depend on it, so a run keeps the "
        f"number that it began with. `auto`: {keys.MICRO_BATCH_TOKENS} on a CPU; on a GPU what fits into its memory.",
    )
    parts: Count = Field(
        default=1,
        description="Parts into which the rows of a step are divided among several devices. Gradients are added part "
        "by part, so that the bits of a step depend on this number and not on the number of devices, which it limits: "
        "8 for a run that will train on 1 to 8.",
    )
    exchange: Literal["exact", "fast"] = Field(
        default="exact",
        description="How several devices add their gradients: in the order of the parts, or, with `fast`, in an order "
        "that depends on the number of devices; handovers then say `close` instead of `bitwise`.",
    )
    sharding: Annotated[Literal["off", "full"], BeforeValidator(on_or_off)] = Field(
        default="off",
        description="With several devices: `full` cuts the model into shards, one per device, for models that do not "
        "fit one device; layers are made whole one after another while they compute. Bits stay the same. "
        "Read when the processes start.",
    )
    activation_checkpointing: Annotated[Literal["auto", "on", "off"], BeforeValidator(on_or_off)] = Field(
        default="auto",
        description="Compute the layers of a part again in its backward pass instead of keeping their activations: "
        "less memory, a third more time, the same bits. `auto`: for parts that would not fit otherwise.",
    )
    cuda_graphs: Annotated[Literal["auto", "off"], BeforeValidator(on_or_off)] = Field(
        default="auto",
        description="Record short steps on an NVIDIA GPU as CUDA graphs and replay them for rows of about the same "
        "sizes: the same bits, which is checked, in less time and more memory. `auto`: where a GPU waits for the host "
        "otherwise, as in the probe of a boundary.",
    )
    epochs: Factor = Field(default=1, description="Number of times that every row of a file is trained.")
    learning_rate: Annotated[float, BeforeValidator(refuse_bool), Field(gt=0.0, allow_inf_nan=False)] = Field(
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
    schedule_offset: Index = Field(
        default=0,
        description="Steps by which the schedule lags behind the step count; set by `adopt`, because a Trainer's first "
        "step has the rate of step 0.",
    )
    min_learning_rate: Rate = Field(
        default=0.0, description="Learning rate below which no schedule falls after warmup."
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw",
        description="AdamW with moments in 32 bits, or in 8, rounded by block: a quarter of their memory (needs "
        "`onward[qlora]`).",
    )
    weight_decay: Rate = Field(
        default=0.0,
        description="AdamW's decoupled weight decay; not on biases and norms, which are told by their names, as by "
        "transformers' Trainer.",
    )
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.999), description="AdamW's decay rates of the two moments."
    )
    eps: Annotated[float, BeforeValidator(refuse_bool), Field(gt=0.0, allow_inf_nan=False)] = Field(
        default=1e-8, description="AdamW's term that prevents division by zero."
    )
    max_grad_norm: Rate = Field(
        default=1.0, description="Gradient norm above which gradients are scaled down; 0 is off."
    )
    save_steps: Count = Field(
        default=100, description="Steps between commits inside a file; a boundary, a stop and a signal always commit."
    )
    log_steps: Count = Field(default=10, description="Steps between progress lines and entries of `log_history`.")
    keep_boundaries: Count = Field(
        default=5, description="Restore points of earlier file boundaries to keep, in addition to the newest."
    )
    keep_days: Index = Field(
        default=7, description="Number of past days for which the last restore point of each day is kept too; 0 is off."
    )
    settle_seconds: Rate = Field(
        default=3.0, description="Seconds that a file in the inbox must go without changes before it is taken."
    )
    retries: Index = Field(
        default=1, description="Number of times that a daemon trains a failed file again before it is quarantined."
    )
    disk_margin_mb: Index = Field(
        default=4, description="Free MiB, beyond the next checkpoint, below which training pauses."
    )
    compress_archive: bool = Field(
        default=False, description="Keep the originals of finished files compressed (zstd); text formats only."
    )
    max_row_mb: Factor = Field(
        default=16, description="MiB of a row, in the file or as it is tokenized, above which a file is refused."
    )
    max_unpacked_mb: Count = Field(
        default=65536,
        description="MiB that a compressed, Parquet or Arrow file may unpack to; a larger one is refused.",
    )
    max_unpack_ratio: Count = Field(
        default=200,
        description="Multiple of its size that a compressed, Parquet or Arrow file may unpack to; applies above 16 "
        "MiB.",
    )
    rank_timeout: Annotated[float, BeforeValidator(refuse_bool), Field(ge=1.0, allow_inf_nan=False)] = Field(
        default=60.0,
        description="Seconds without a sign of life from one of several processes after which all of them end; read "
        "when they start.",
    )
    notify: NotifyConfig = Field(default=NotifyConfig(), description="Who is notified of events.")
    holdout: Literal["auto"] | Fraction = Field(
        default=0.0,
        description="Share of a file's rows that are held out of training, to measure on; `auto`: 2 % of files of 200 "
        "rows or more, 64 at most. `onward init` writes `auto`.",
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="What the model is measured on at each boundary."
    )
    anchor: AnchorConfig = Field(default=AnchorConfig(), description="Texts that the base model writes once.")
    replay: ReplayConfig = Field(default=ReplayConfig(), description="Rows of earlier files in the steps of a new one.")
    guard: GuardConfig = Field(default=GuardConfig(), description="When a file causes a warning or is taken back.")
    track: Annotated[list[Tracker], AfterValidator(refuse_twice)] = Field(
        default=[],
        description="Trackers that receive every step, in the background: `trackio`, `wandb`, `mlflow`, `tensorboard` "
        "(each an extra: `onward[wandb]`), or one from another package.",
    )
    boundary: Literal["carry", "reset_moments", "rewarm"] = Field(
        default="carry",
        description="What happens to the optimizer between files: all continues, moments restart, or warmup repeats.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.schedule in keys.HORIZON_SCHEDULES:
            if self.total_steps is None:
                raise ValueError(f"schedule {self.schedule} needs total_steps; constant, inverse_sqrt and wsd do not")
            if self.total_steps <= self.warmup_steps:
                raise ValueError(f"total_steps {self.total_steps} is not above warmup_steps {self.warmup_steps}")
        self._require_method()
        return self

    def _require_method(self) -> None:
        if self.method != "full" and self.train:
            raise ValueError("train names weights for method full; an adapter has lora.modules_to_save")
        if self.method == "full" and self.adapter:
            raise ValueError("adapter is for methods lora and qlora: method full has no adapter")
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError("tokens names a token twice")
        for pattern in self.train:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"train: {pattern!r} is not a regular expression: {error}") from None

    @property
    def takes_from_base(self) -> bool:
        """Whether the adapter's initial weights are taken out of the base, so that the run has a base of its own."""
        return self.method != "full" and self.lora.init in RESIDUAL_INITS

    @property
    def most_parts(self) -> int:
        """The largest number of parts that a step is split into."""
        if self.gradient_accumulation != "auto":
            return max(self.parts, self.gradient_accumulation)
        return min(self.batch_size, max(self.parts, -(-self.batch_size * self.max_length // self.part_tokens)))

    @property
    def part_tokens(self) -> int:
        """The most tokens of a part, where the number of parts is not fixed."""
        return keys.MICRO_BATCH_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    def flat(self) -> dict[str, Any]:
        """Return every setting by dotted key, as JSON values."""
        values = self.model_dump(mode="json")
        sections = {name: cast(dict[str, Any], values.pop(name)) for name in keys.SECTIONS}
        inner = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        return {**values, **inner}

    def recorded(self) -> dict[str, Any]:
        """Return the config as manifests, the ledger and events may show it: JSON values without the secret keys."""
        values = self.model_dump(mode="json")
        for key in keys.SECRET_KEYS:
            section, _, name = key.partition(".")
            del values[section][name]
        return values

    def asking(self, files: list[str]) -> Config:
        """Return this config with other `evaluation.files`, which change no weight."""
        return self.model_copy(update={"evaluation": self.evaluation.model_copy(update={"files": files})})

    def training(self) -> dict[str, Any]:
        """Return the settings that a step's result depends on, by dotted key."""
        flat, plain = self.flat(), Config().flat()
        return {
            key: value
            for key, value in flat.items()
            if key.partition(".")[0] not in keys.OPERATION_KEYS and not (key in keys.LATER_KEYS and value == plain[key])
        }

    def with_operation_keys_of(self, other: Config) -> Config:
        """Return this config with those keys of another that take effect at once."""
        return self.model_copy(update={key: getattr(other, key) for key in keys.OPERATION_KEYS})

    def identity(self) -> dict[str, Any]:
        """Return the identity keys with their values; the adapter's only where there is an adapter.

        Those of `LATER_IDENTITY_KEYS` are left out at their defaults, so that a run made by an earlier release keeps
        the identity that it was locked with.
        """
        flat, default = self.flat(), Config().flat()
        names = [key for key in keys.IDENTITY_KEYS if self.method != "full" or not key.startswith("lora.")]
        return {key: flat[key] for key in names if key not in keys.LATER_IDENTITY_KEYS or flat[key] != default[key]}

    def identity_changes(self, locked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return `{key: (locked value, value here)}` for every identity key that differs from a locked identity."""
        default, here = Config().flat(), self.identity()
        later = [key for key in keys.LATER_IDENTITY_KEYS if key in here or key in locked]
        pairs = {key: (locked.get(key, default[key]), here.get(key, default[key])) for key in later}
        pairs |= {key: (locked[key], here.get(key)) for key in keys.IDENTITY_KEYS if key in locked and key not in pairs}
        if self.method == "full":  # an adapter's keys have no effect then, and nobody changed them
            pairs = {key: pair for key, pair in pairs.items() if not key.startswith("lora.")}
        return {key: (there, value) for key, (there, value) in pairs.items() if there != value}

    def differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Return `{key: (value here, value in other)}` for every key that differs, except the secret ones."""
        here, there = self.flat(), other.flat()
        return {key: (here[key], there[key]) for key in here if here[key] != there[key] and key not in keys.SECRET_KEYS}


def known_keys() -> list[str]:
    """Return every dotted key that a config may have."""
    return list(Config().flat())
