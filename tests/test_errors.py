"""Errors as another process or thread meets them."""

from __future__ import annotations

import copy
import errno
import os
import pickle

import pytest

from onward import errors
from onward.errors import GuardRejected, OnwardError, cannot_write

KINDS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, OnwardError)]
MADE = [GuardRejected("a file is too far off", 3, [{"row": 7}])] + [
    kind("it is so", where="a.jsonl", hint="do this") for kind in KINDS if kind is not GuardRejected
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_an_error_comes_whole_out_of_a_pool_of_processes(error: OnwardError) -> None:
    """Pickled or copied, it is of its kind and has its text and facts, whatever its constructor takes."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(error) is type(other)
        assert (str(error), error.args, vars(error)) == (str(other), other.args, vars(other))


@pytest.mark.parametrize(
    ("number", "status", "hint"),
    [
        (errno.ENOSPC, 1, "Free some space"),
        (errno.EDQUOT, 1, "Free some space"),
        (errno.EIO, 1, "Fix the disk or its mount, then the same command again"),
        (errno.EMFILE, 1, "ulimit -n"),
        (errno.EACCES, 2, "Name another place"),
        (errno.EROFS, 2, "Name another place"),
        (errno.ENOENT, 2, "Name another place"),
    ],
    ids=errno.errorcode.get,
)
def test_a_result_that_cannot_be_written(number: int, status: int, hint: str) -> None:
    """Only a place where nothing can be written is wrong usage, a machine that fails is not; each has its way out."""
    error = cannot_write(OSError(number, os.strerror(number)), "a.svg")
    assert (status, f"cannot write it: {os.strerror(number)} [a.svg]") == (
        error.exit_status,
        str(error).splitlines()[0],
    )
    assert hint in str(error.hint)
