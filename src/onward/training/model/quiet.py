"""Keeps transformers, PEFT, PyTorch's outlines and Python's warnings off the screen while a model is loaded or saved.

Verbosity, progress bars and warning filters belong to the process, so threads share one silence: the first one in
begins it, the last one out restores what was there before.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from onward.training.device.shared import SharedSetting

LEVELS = {"peft": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}
"""What loggers may still say. The second one logs, with a traceback, each operation that cannot be outlined."""


def _begin(restore: contextlib.ExitStack) -> None:
    restore.enter_context(warnings.catch_warnings())  # first in, last out: putting bars back may warn
    restore.callback(disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars)
    if transformers_logging.is_progress_bar_enabled():
        restore.callback(transformers_logging.enable_progress_bar)
    restore.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name, level in LEVELS.items():
        logger = logging.getLogger(name)
        restore.callback(logger.setLevel, logger.level)
        logger.setLevel(level)


quiet = SharedSetting(_begin)
"""Silence in the body, in whatever thread; errors are still raised."""

one_load = threading.RLock()
"""Held while transformers makes a model. It replaces methods of its own classes meanwhile, which affects a load in
another thread: that would report tied weights as missing."""
