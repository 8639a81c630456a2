"""How the library owns a run while it works on it: the lock, the requests, the other processes that train with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onward.config import Config
from onward.layout import RunLayout
from onward.library.controlled import Controlled
from onward.library.making import open_ledger
from onward.library.torch_defaults import defaults_of_torch
from onward.ranks import Place, Start
from onward.service import client
from onward.service.lock import RunLock
from onward.service.moment import require_same_moment
from onward.service.owner.process import OpenedRun
from onward.service.settings import Settings
from onward.service.wishes import Stopped, Wishes, interrupts_of_host
from onward.store.ledger import Ledger

if TYPE_CHECKING:
    from onward.training.world import World

PathLike = str | os.PathLike[str]
Report = Callable[[str], None]
Loading = Callable[[], AbstractContextManager[None]]


def silent(_: Any) -> None:
    """Pass nothing on to anybody."""


class Owning(Controlled):
    """A run that this process can own. The arguments are those of `Run`."""

    def __init__(
        self, directory: PathLike = ".", *, loading: Loading = contextlib.nullcontext, place: Place | None = None,
        start: Start | None = None,
    ) -> None:  # fmt: skip
        super().__init__(RunLayout(Path(directory)))
        self._loading = loading
        self._place, self._start = place, start
        self._settings: Settings | None = None

    @property
    def config(self) -> Config:
        """The config as it is in the run's directory; read again only when the file changed."""
        if self._settings is None:
            self._settings = Settings(self.layout.config)
        return self._settings.read()

    @contextlib.contextmanager
    def _owned(self, wishes: Wishes | None = None, *, same_moment: bool = True) -> Generator[Ledger]:
        """Own the run; by default only if its ledger is of the same moment as its model.

        What trains learns that when it settles, and waits while a disk cannot be read.
        """
        with open_ledger(self.layout, None if wishes is None else wishes.waiting) as ledger:
            asked = ledger.last_request()  # later requests are meant for this process
            with RunLock(self.layout.lock), defaults_of_torch():
                if same_moment:
                    require_same_moment(self.layout, ledger)
                client.expire_requests(ledger, asked)
                if wishes is not None:
                    wishes.ignore_up_to(asked)
                yield ledger

    @contextlib.contextmanager
    def _working(self, stop: Wishes | None, report: Report) -> Generator[tuple[Wishes, OpenedRun]]:
        """Own the run, and lead the other processes if several train it; yield what is asked of it, too."""
        wishes = Wishes() if stop is None else stop
        interrupts = interrupts_of_host(wishes, are_own=stop is None)
        with self._leading(wishes, report) as world, self._owned(wishes, same_moment=False) as ledger, interrupts:
            yield wishes, self._opened(ledger, report, world)

    @contextlib.contextmanager
    def _leading(self, wishes: Wishes, report: Report) -> Generator[World | None]:
        """Form the group of all processes that train, and lead it; yield None if this is the only one, or was asked to
        stop before the others had joined."""
        if self._place is None:
            yield None
            return
        with self._loading():
            from onward.service.owner.leading import leading
        with contextlib.ExitStack() as led:
            world = None
            with contextlib.suppress(Stopped):
                world = led.enter_context(leading(self._place, self.config.rank_timeout, wishes, report))
            yield world

    def _opened(self, ledger: Ledger, report: Report = silent, world: World | None = None) -> OpenedRun:
        return OpenedRun(self.layout, ledger, report, loading=self._loading, world=world)
