"""The library for every process but the first when several train a run together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from onward.config import Config
from onward.config.text import read_config
from onward.errors import OnwardError, UsageError
from onward.layout import RunLayout
from onward.library.torch_defaults import defaults_of_torch
from onward.ranks import Place
from onward.service.wishes import Stopped, Wishes


def follow(
    directory: str | os.PathLike[str],
    place: Place,
    *,
    stop: Wishes | None = None,
    report: Callable[[str], None] = lambda _: None,
    loading: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Take the steps of a run that rank 0 (`Run(directory, place=place).train`) announces, until it ends.

    Args:
        directory: the run's directory, as seen from this machine.
        place: which process this is (`onward.ranks.place_here`).
        stop: a stop asked for here is passed on to rank 0.
        report: receives a line if rank 0 can no longer say why it ends, or was not found from this machine.
        loading: a context in which torch and other large libraries are imported.

    Raises:
        UsageError: the run's directory is not on this machine.
        ConfigError: the config is refused.
        RankLost: another rank is gone.
    """
    layout, stop = RunLayout(Path(directory)), Wishes() if stop is None else stop
    try:
        patience = _config_here(layout).rank_timeout
        with loading():
            from onward.service.owner import follower

        group = follower.join(place, patience, stop)
    except Stopped:
        return
    except OnwardError as error:
        if place.local_rank == 0:  # rank 0 says what keeps those of its own machine from it, but knows of no other
            report(f"onward: rank {place.rank}: {error}")
        raise
    with defaults_of_torch():
        follower.follow(layout, group, stop, report)


def _config_here(layout: RunLayout) -> Config:
    if not layout.root.is_dir():
        hint = "Every machine needs the run's directory at the same path."
        raise UsageError("the run is not on this machine", where=layout.root.absolute(), hint=hint)
    return read_config(layout.config)
