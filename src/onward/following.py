"""The library for every process but the first when several train a run together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from onward.config.text import read_config
from onward.layout import RunLayout
from onward.library.torch_defaults import defaults_of_torch
from onward.ranks import Place
from onward.service.wishes import Wishes


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
        report: receives a line if rank 0 can no longer say why it ends.
        loading: a context in which torch and other large libraries are imported.

    Raises:
        ConfigError: the config is refused.
        RankLost: another rank is gone.
    """
    layout = RunLayout(Path(directory))
    patience = read_config(layout.config).rank_timeout
    with loading():
        from onward.service.owner.follower import follow as follow_first

    with defaults_of_torch():
        follow_first(layout, place, patience, Wishes() if stop is None else stop, report)
