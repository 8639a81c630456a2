"""The command line: parse, call `Run`, print. Results go to stdout, messages for people to stderr."""

from onward.cli.application import app
from onward.cli.entry import main

__all__ = ["app", "main"]
