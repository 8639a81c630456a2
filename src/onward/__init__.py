"""Onward: cumulative fine-tuning. N training files equal one run, bit for bit, and it proves it."""

from onward.version import __version__

TYPE_CHECKING = False  # stands for typing.TYPE_CHECKING without importing typing: see __main__

if TYPE_CHECKING:
    from onward.events import Committed, Event, FileDone, FileStarted, Note, Resumed, StepTaken
    from onward.run import Run
    from onward.service.wishes import Wishes

__all__ = [
    "Committed",
    "Event",
    "FileDone",
    "FileStarted",
    "Note",
    "Resumed",
    "Run",
    "StepTaken",
    "Wishes",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "Run":
        from onward.run import Run

        return Run
    if name == "Wishes":
        from onward.service.wishes import Wishes

        return Wishes
    if name in __all__:
        from onward import events

        return getattr(events, name)
    raise AttributeError(f"module 'onward' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
