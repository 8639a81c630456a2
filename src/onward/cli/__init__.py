"""The command line: parse, call `Run`, print. Results go to stdout, messages for people to stderr."""

import sys

from onward.text import without_module

try:
    from onward.startup import endings_interrupt, interrupted, require_platform
except ImportError as error:
    words = without_module(error)
    if words is None:
        raise
    sys.exit(f"onward: {words}")

require_platform()  # before importing anything that Windows lacks

came: list[str] = []
try:
    with endings_interrupt() as came:  # the imports take a third of a short command's time
        from onward.cli.application import app
        from onward.cli.entry import main
except KeyboardInterrupt:
    sys.exit(interrupted(came))

__all__ = ["app", "main"]
