"""Silence while a model is loaded, in several threads at once."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from onward.training.model.load import load_base
from onward.training.model.quiet import quiet


def state() -> dict[str, Any]:
    """Return what `quiet` changes for the whole process."""
    return {
        "filters": list(warnings.filters),
        "verbosity": transformers_logging.get_verbosity(),
        "peft": logging.getLogger("peft").level,
        "bars": (transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()),
    }


def is_silent() -> bool:
    """Return whether nothing is shown now."""
    now = state()
    return (
        now["filters"][0][0] == "ignore"
        and now["verbosity"] == now["peft"] == logging.ERROR
        and now["bars"] == (False, True)
    )


@pytest.fixture(params=["bars on", "bars off"])
def before(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The state of a program that has set all of it for itself; it must be the same at the end."""
    verbosity, level = transformers_logging.get_verbosity(), logging.getLogger("peft").level
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        transformers_logging.set_verbosity_info()
        logging.getLogger("peft").setLevel(logging.DEBUG)
        if request.param == "bars off":
            transformers_logging.disable_progress_bar()
        found = state()
        yield found
        assert found == state()
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    logging.getLogger("peft").setLevel(level)


def test_silence_ends_as_it_began(before: dict[str, Any]) -> None:
    """Within nothing is shown; afterwards everything is as before, nested or after an error too."""
    with quiet():
        assert is_silent()
        with quiet():
            assert is_silent()
        assert is_silent()
    assert before == state()
    with contextlib.suppress(ValueError), quiet():
        raise ValueError
    assert before == state()


def test_the_first_thread_to_enter_leaves_first(before: dict[str, Any]) -> None:
    """Two threads that overlap are silent as long as either is in it; the last one out restores everything."""
    entered, left = (threading.Event(), threading.Event()), (threading.Event(), threading.Event())
    may_leave = (threading.Event(), threading.Event())
    seen: list[bool] = []

    def stay(number: int) -> None:
        with quiet():
            entered[number].set()
            may_leave[number].wait()
            seen.append(is_silent())
        left[number].set()

    threads = [threading.Thread(target=stay, args=(number,)) for number in (0, 1)]
    for thread, event in zip(threads, entered, strict=True):
        thread.start()
        event.wait()
    for event, gone in zip(may_leave, left, strict=True):
        event.set()
        gone.wait()
        seen.append(is_silent())
    for thread in threads:
        thread.join()
    assert [True, True, True, False] == seen
    assert before == state()


def test_models_are_loaded_in_several_threads(model: Path) -> None:
    """A load alongside another one finds every weight: transformers replaces methods of its classes meanwhile."""
    failures: list[BaseException] = []

    def load_often() -> None:
        try:
            for _ in range(10):
                load_base(model, torch.float32)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == failures
