"""What a config may ask for if the model is sharded, and what that needs of PyTorch."""

from __future__ import annotations

from onward.config import Config
from onward.errors import ConfigError
from onward.training.device.support import require_support

NEEDS = ("set_custom_reduce_scatter", "set_reduce_scatter_unused_params")
"""Methods of FSDP2 that the exact exchange of gradients calls."""


def require_shardable(config: Config) -> None:
    """Refuse a config with anything that needs a forward pass of rank 0 alone, or weights that cannot be sharded.

    Raises:
        ConfigError: it has such a key, or PyTorch is too old.
    """
    require_fsdp()
    needs = {
        "evaluation.share": (config.evaluation.share, 0),
        "anchor.weight": (config.anchor.weight, 0),
    }
    for key, (value, without) in needs.items():
        if value != without:
            raise ConfigError(
                f"{key} is {value}, which sharding does not support yet",
                where=key,
                hint=f"Set {key}: {without}, or sharding: off.",
            )
    for key, value, without in (("optimizer", config.optimizer, "adamw"), ("dtype", config.dtype, "auto")):
        if value in ("adamw_8bit", "float16"):
            raise ConfigError(
                f"{key} is {value}, which sharding does not support yet",
                where=key,
                hint=f"Make another run with {key}: {without}, or set sharding: off.",
            )
    if config.method == "qlora":
        raise ConfigError("4-bit weights cannot be cut into shards", where="sharding", hint="Set sharding: off.")


def require_fsdp() -> None:
    """Refuse a PyTorch that cannot shard a model as exactly as one device computes it.

    Raises:
        ConfigError: PyTorch is too old.
    """
    from torch.distributed.fsdp import FSDPModule  # takes a second, which only models in shards have to spend

    require_support("sharding", {FSDPModule: NEEDS}, where="sharding", instead="set sharding: off")
