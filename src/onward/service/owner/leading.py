"""Rank 0 as the leader of the others: it turns their signals into wishes, and tells them when it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from functools import partial
from typing import NoReturn

from onward.errors import RankLost
from onward.ranks import LOST, Place
from onward.service.wishes import Wishes
from onward.training.ranks.forming import form
from onward.training.ranks.group import Group
from onward.training.ranks.orders import END


@contextlib.contextmanager
def leading(place: Place, patience: float, wishes: Wishes, report: Callable[[str], None]) -> Generator[Group]:
    """Form the group and lead it in the body; however that ends, the other ranks end too.

    Args:
        patience: seconds after which a rank that shows no sign of life is lost.
        report: receives differences between ranks.

    Raises:
        RankLost: a rank did not join.
        Stopped: a stop was asked for before all had joined.
    """
    group = form(place, patience, report, wishes.check_for_end)
    group.watch.on_stop, group.watch.on_loss = wishes.ask, partial(_end_process, report)
    try:
        yield group
    except RankLost as error:  # the others may be waiting for this one in a place where they cannot be told
        group.is_broken = True
        explained = group.watch.explain(error)
        _end(group)
        raise explained from None
    except BaseException:
        _end(group)
        raise
    else:
        group.end({"order": END})


def _end_process(report: Callable[[str], None], error: RankLost) -> NoReturn:
    report(f"onward: {error}")
    os._exit(LOST)


def _end(group: Group) -> None:
    with contextlib.suppress(Exception):  # the error being raised matters more
        group.end({"order": END})
