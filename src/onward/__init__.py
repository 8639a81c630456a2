"""Onward: cumulative fine-tuning. N training files equal one run, bit for bit, and it proves it."""

from onward.version import __version__

TYPE_CHECKING = False  # stands for typing.TYPE_CHECKING without importing typing: see __main__

if TYPE_CHECKING:
    from onward.errors import (
        ConfigError,
        DamagedState,
        FileRejected,
        ModelError,
        NoSpace,
        OnwardError,
        RunLocked,
        TrainingError,
        Unreadable,
        UsageError,
        VerificationFailed,
    )
    from onward.events import Committed, Event, FileDone, FileStarted, Note, Resumed, StepTaken
    from onward.run import Run
    from onward.service.wishes import Wishes
    from onward.views.chat.sampling import Sampling
    from onward.views.programs import evaluate, load_engine

__all__ = [
    "Committed",
    "ConfigError",
    "DamagedState",
    "Event",
    "FileDone",
    "FileRejected",
    "FileStarted",
    "ModelError",
    "NoSpace",
    "Note",
    "OnwardError",
    "Resumed",
    "Run",
    "RunLocked",
    "Sampling",
    "StepTaken",
    "TrainingError",
    "Unreadable",
    "UsageError",
    "VerificationFailed",
    "Wishes",
    "__version__",
    "evaluate",
    "load_engine",
]

_HOMES = {
    "onward.run": ("Run",),
    "onward.service.wishes": ("Wishes",),
    "onward.views.chat.sampling": ("Sampling",),
    "onward.views.programs": ("evaluate", "load_engine"),
    "onward.events": ("Committed", "Event", "FileDone", "FileStarted", "Note", "Resumed", "StepTaken"),
}
"""The modules of the public names; all others are in `onward.errors`."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'onward' has no attribute {name!r}")
    from importlib import import_module

    home = next((module for module, names in _HOMES.items() if name in names), "onward.errors")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
