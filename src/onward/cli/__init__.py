"""The command line: parse, call `Run`, print. Results go to stdout, messages for people to stderr."""

import sys

from onward.text import without_module

try:
    from onward.startup import require_platform
except ImportError as error:
    words = without_module(error)
    if words is None:
        raise
    sys.exit(f"onward: {words}")

require_platform()  # before importing anything that Windows lacks

from onward.cli.application import app  # noqa: E402
from onward.cli.entry import main  # noqa: E402

__all__ = ["app", "main"]
