"""Imported first in the process from which those that train are forked, which is none of the command line's."""

from __future__ import annotations

from onward.startup import keep_out_fetched_code

keep_out_fetched_code()
