"""Coverage of the processes that tests fork: measured from there on, and stored once by each of them.

Imported last by the process that they are forked from (`processes`). What coverage does by itself for a forked process
takes a quarter of a second: it sets out anew in each, stores its data three times, and looks each time for files of the
package that were never imported.
"""

from __future__ import annotations

import os

from processes import COVERAGE, COVERAGE_LATER

OPTIONS = {
    "run:source_pkgs": [],
    "run:include": ["*/src/onward/*"],
    "run:patch": ["_exit"],
    "run:disable_warnings": ["no-data-collected", "module-not-measured"],
}
"""What is set otherwise than for the processes that tests run in."""

if COVERAGE_LATER in os.environ:
    from coverage import Coverage

    config = os.environ[COVERAGE] = os.environ.pop(COVERAGE_LATER)  # for programs that forked processes start
    measured = Coverage(config_file=f":data:{config}")
    for name, value in OPTIONS.items():
        measured.set_option(name, value)
    measured.start()
