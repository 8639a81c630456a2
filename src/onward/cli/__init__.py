"""The command line: parse, call `Run`, print. Results go to stdout, messages for people to stderr."""

from onward.startup import require_platform

require_platform()  # before importing anything that Windows lacks

from onward.cli.application import app  # noqa: E402
from onward.cli.entry import main  # noqa: E402

__all__ = ["app", "main"]
