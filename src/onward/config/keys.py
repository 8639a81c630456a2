"""Tables of the config's keys: which are locked, which act at once, which came later, which are secret."""

from __future__ import annotations

from typing import Literal

LATER_IDENTITY_KEYS = (
    "lora.target_parameters", "lora.layers", "lora.rank_pattern", "lora.alpha_pattern", "lora.use_dora",
    "lora.use_rslora", "lora.bias", "lora.init", "lora.modules_to_save", "lora.trainable_tokens",
    "train", "tokens", "adapter", "chat_template", "optimizer",
)  # fmt: skip
"""Identity keys that runs of earlier releases lack; where one has its default, the identity does not mention it."""

IDENTITY_KEYS = (
    "model", "method", "lora.rank", "lora.alpha", "lora.targets", "seed", "dtype", *LATER_IDENTITY_KEYS
)  # fmt: skip
"""Keys that make a run what it is: locked once it has trained a step."""

SECTIONS = ("lora", "text", "notify", "evaluation", "anchor", "replay", "guard")
"""Keys that have keys of their own."""

OPERATION_KEYS = (
    "save_steps", "log_steps", "keep_boundaries", "keep_days", "settle_seconds", "retries", "disk_margin_mb",
    "compress_archive", "notify", "track", "guard", "activation_checkpointing", "cuda_graphs", "rank_timeout",
    "sharding", "max_row_mb", "max_unpacked_mb", "max_unpack_ratio", "bad_rows", "bad_rows_share",
)  # fmt: skip
"""Keys that no weight depends on: they take effect at once, even in a running process, except for `START_KEYS`."""

START_KEYS = ("rank_timeout", "sharding")
"""Keys by which processes that train together find each other and share the model: read when these start."""

LATER_KEYS = (
    *LATER_IDENTITY_KEYS, "columns", "text.documents", "schedule_offset", "eps", "deterministic",
    "micro_batch_tokens", "parts", "exchange", "holdout", "evaluation.rows", "evaluation.share", "evaluation.files",
    "anchor.rows", "anchor.tokens", "anchor.weight", "replay.share", "replay.policy",
)  # fmt: skip
"""Keys that a later release added: digests leave them out at their defaults, and so equal those of earlier releases."""

SECRET_KEYS = ("notify.command", "notify.url")
"""Keys that may hold a password or a token: their values appear in the config file and nowhere else."""

NEAR_SECRETS = ("notify", "track")
"""Keys next to which people write addresses and tokens, be it in the wrong place: a refusal does not repeat what it
refuses of them, nor the value of a key that it does not know."""

NEW_RUN = {
    "over_length": "auto", "text.documents": "auto", "holdout": "auto", "evaluation.share": 0.05,
    "guard.action": "warn",
}  # fmt: skip
"""What `init` and `adopt` write for these keys, unless told otherwise. Their defaults differ: a run of an earlier
release whose config does not name them still reads files as it did, trains on all of their rows and measures none."""

HORIZON_SCHEDULES = ("cosine", "linear")
"""Schedules that need `total_steps`."""


MICRO_BATCH_TOKENS = 8192
"""Tokens per part of a step under `micro_batch_tokens: auto`, on a CPU. The last bits of a step depend on it."""


Acts = Literal["never", "at the next start", "at the next file", "at once"]


def acts(key: str) -> Acts:
    """Return when a change of a key takes effect in a run that has trained; nothing else decides this."""
    if key in IDENTITY_KEYS:
        return "never"
    if key in START_KEYS:
        return "at the next start"
    return "at once" if key.partition(".")[0] in OPERATION_KEYS else "at the next file"
