"""Errors as another process or thread meets them."""

from __future__ import annotations

import copy
import pickle

import pytest

from onward import errors
from onward.errors import GuardRejected, OnwardError

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
