"""The sections of a config, which have keys of their own, and the types of its values."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

RESIDUAL_INITS = ("pissa", "olora")
"""Initial weights of an adapter that are taken out of the base (PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775)."""


def refuse_bool(value: Any) -> Any:
    """Refuse true and false where a number is meant: to Python they are 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def on_or_off(value: Any) -> Any:
    """Return a switch as text: YAML reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def path_text(value: Any) -> Any:
    """Return a path as text; anything else is returned as it is, for pydantic to refuse."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Count = Annotated[int, BeforeValidator(refuse_bool), Field(ge=1)]
Factor = Annotated[int, BeforeValidator(refuse_bool), Field(ge=1, lt=10**9)]
"""A count that others are multiplied by: the product must fit into 64 bits."""
Index = Annotated[int, BeforeValidator(refuse_bool), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(refuse_bool), Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(refuse_bool), Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(refuse_bool), Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
PathText = Annotated[Name, BeforeValidator(path_text)]
"""A path, or what may be one; a `Path` is taken as its text."""
Tracker = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


def refuse_twice(names: list[str]) -> list[str]:
    """Refuse a list that names something twice."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice")
    return names


ROW_KEYS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "system", "history",
    "tools",
)  # fmt: skip
"""Keys of the row formats that `columns` may name a column for."""


def _check_columns(columns: dict[str, str]) -> dict[str, str]:
    unknown = next((key for key in columns if key not in ROW_KEYS), None)
    if unknown is not None:
        raise ValueError(f"{unknown!r} is not a key of a row format; write {{KEY: COLUMN}} with {', '.join(ROW_KEYS)}")
    twice = next((name for name in columns.values() if list(columns.values()).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the column {twice!r} is named for two keys")
    return columns


Columns = Annotated[dict[str, Name], AfterValidator(_check_columns)]


class Section(BaseModel):
    """Keys of a config: unknown ones are refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(Section):
    """The adapter; ignored for `method: full`."""

    rank: Count = Field(default=16, description="Rank of the two adapter matrices.")
    alpha: Annotated[float, BeforeValidator(refuse_bool), Field(gt=0.0, allow_inf_nan=False)] = Field(
        default=32.0, description="Scale: the adapter's output is multiplied by alpha / rank."
    )
    dropout: Fraction = Field(default=0.05, description="Dropout on the adapter's input while training.")
    targets: str | list[str] = Field(
        default="all-linear",
        description="Names of the modules that get an adapter, or `all-linear` (every linear layer except the head).",
    )
    target_parameters: list[Name] = Field(
        default=[],
        description="Parameters that get an adapter, for experts stored as one tensor: `mlp.experts.gate_up_proj`. "
        "Needs `lora.dropout: 0`.",
    )
    layers: list[Index] = Field(
        default=[], description="Layers whose `targets` get an adapter, counted from 0; all if empty."
    )
    rank_pattern: dict[str, Count] = Field(
        default={}, description="Other ranks, by module name (`{q_proj: 4}`) or a regular expression for its end."
    )
    alpha_pattern: dict[str, Annotated[float, BeforeValidator(refuse_bool), Field(gt=0.0, allow_inf_nan=False)]] = (
        Field(default={}, description="Other values of alpha, written in the same way.")
    )
    use_dora: bool = Field(default=False, description="DoRA: train the magnitude of each weight's columns separately.")
    use_rslora: bool = Field(default=False, description="rsLoRA: scale by alpha / sqrt(rank) instead.")
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Biases to train as well: none, all, or those of layers with an adapter."
    )
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        default="default",
        description="Initial weights of the adapter. `pissa` and `olora` subtract them from the base, so the run keeps "
        "the remainder as its own base (`base/`, float32).",
    )
    modules_to_save: list[Name] = Field(
        default=[], description="Modules to train whole in addition to the adapter, by name: `lm_head`, `embed_tokens`."
    )
    trainable_tokens: list[Index] | dict[str, list[Index]] = Field(
        default=[],
        description="Token ids whose rows are trained in the embedding and the head, or "
        "`{module: [ids]}`. Those of `tokens` need not be listed.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.targets and not self.target_parameters:
            raise ValueError("lora.targets is empty: name modules, or use all-linear")
        if self.target_parameters and self.dropout:
            raise ValueError("lora.target_parameters needs lora.dropout 0: what an expert reads cannot be dropped")
        if self.target_parameters and (self.use_dora or self.init in RESIDUAL_INITS):
            raise ValueError("lora.target_parameters cannot be combined with lora.use_dora, init pissa or olora")
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            raise ValueError("lora.init orthogonal needs even ranks")
        return self


class TextConfig(Section):
    """How a `.txt` file is read."""

    documents: Literal["auto", "line", "blank", "file"] = Field(
        default="line",
        description="What one row of a .txt file is: a line, the lines between two blank ones, the whole file; `auto` "
        "chooses by looking at the file, and says what it chose. `onward init` writes `auto`.",
    )


class EvaluationConfig(Section):
    """What the model is measured on at each boundary."""

    rows: Count = Field(default=16, description="Rows of each file that the model is measured on.")
    share: Share = Field(
        default=0.0,
        description="Share of the cost of training that measuring may add, counted in tokens; what does not fit is "
        "left blank. 0 is off; `onward init` writes 0.05.",
    )
    files: list[PathText] = Field(
        default=[], description="Files with questions of your own that the model is measured on and never trained on."
    )


class AnchorConfig(Section):
    """Texts that the base model writes once: how far the model has moved from it where no file says anything."""

    rows: Index = Field(default=64, description="Number of texts that the base writes; 0 is none.")
    tokens: Annotated[int, BeforeValidator(refuse_bool), Field(ge=2)] = Field(
        default=128, description="Tokens of each text."
    )
    weight: Rate = Field(
        default=0.0, description="Weight of the KL divergence to the base on these texts in the loss; 0 is off."
    )


class ReplayConfig(Section):
    """Rows of earlier files in the steps of a new one."""

    share: Share = Field(
        default=0.0, description="Replayed rows per row of the new file, in addition to them; 0 is off."
    )
    policy: Literal["uniform", "recent", "forgotten"] = Field(
        default="uniform",
        description="Which rows: from all earlier files alike, preferably from recent files, or preferably from those "
        "that the last grid shows as forgotten.",
    )


class GuardConfig(Section):
    """What a file may do to the model before somebody is told, or before it is taken back."""

    action: Annotated[Literal["off", "warn", "reject"], BeforeValidator(on_or_off)] = Field(
        default="off",
        description="What happens to a file that exceeds a limit: nothing, a warning, or it is taken back to its "
        "boundary and quarantined; `onward accept` overrides this. `onward init` writes `warn`.",
    )
    forgetting: Rate = Field(
        default=0.1, description="Share by which the loss on the rows of an earlier file may grow; 0 is off."
    )
    anchor: Rate = Field(
        default=0.5, description="Nats per token by which the KL divergence from the base may grow; 0 is off."
    )
    spike: Rate = Field(
        default=4.0,
        description="Robust z-score that a file's loss or gradient norm may not exceed three steps in a row, measured "
        "against the 50 steps before; 0 is off.",
    )
    answers: Rate = Field(
        default=2.0,
        description="Under `reject`: standard errors by which answers must fit their own questions better than those "
        "of other rows, if the model can tell them apart for an earlier file; 0 is off.",
    )


class NotifyConfig(Section):
    """Who is notified of events while a process trains; nobody unless named here."""

    command: Annotated[str, Field()] = Field(
        default="", description="A program with its arguments; it receives the event as JSON on its standard input."
    )
    url: Annotated[str, Field(pattern=r"^(https?://.+)?$")] = Field(
        default="", description="A webhook to which the event is posted as JSON."
    )
    events: list[Literal["done", "rejected", "failed", "paused"]] = Field(
        default=["rejected", "failed", "paused"],
        description="Which events to notify about: done, rejected, failed, paused.",
    )
