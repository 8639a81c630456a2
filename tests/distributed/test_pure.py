"""What several devices need, as functions: places, numbers of devices, shares of a step, messages."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ledgers import add_file, made_up_run
from processes import apart, as_it_is
from torch.distributed.run import get_args_parser

from onward import errors
from onward.config import Config
from onward.data.plan.loader import Batch
from onward.data.plan.order import FilePlan, RowReference
from onward.data.plan.replay import ReplayPlan, Source
from onward.data.tokenized import Row
from onward.errors import DeviceLost, FileRejected, GuardRejected, OnwardError, RankLost, UsageError
from onward.ranks import Place, place_here, start_here
from onward.service.client import Given
from onward.service.outside.elastic import Devices, read_devices, start_method
from onward.service.wishes import Stopped, Wishes
from onward.store.ledger import Ledger
from onward.training.device.environment import promises_bits, ranks_facts
from onward.training.ranks.failures import from_message, to_message
from onward.training.ranks.meeting import meet
from onward.training.ranks.orders import plan_message, plan_told
from onward.training.steps.parts import parts_of, shares_of
from onward.training.world import SingleProcess

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


def batch(lengths: list[int]) -> Batch:
    """Return a batch of rows of some lengths."""
    rows = [Row(np.arange(length), np.ones(length, dtype=bool)) for length in lengths]
    return Batch(rows, [RowReference("00", place) for place in range(len(rows))], list(range(len(rows))))


def test_the_place_is_what_torchrun_says() -> None:
    """A process without torchrun's variables, or alone in them, has no place; what makes no sense is refused."""
    assert place_here({}) is None
    assert place_here({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert Place(3, 4, 1, 2) == place_here(TORCHRUN)
    for wrong in ({"RANK": "4"}, {"RANK": "x"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "5"}):
        with pytest.raises(UsageError, match="variables of torchrun"):
            place_here({**TORCHRUN, **wrong})
    with pytest.raises(UsageError, match="RANK is set without MASTER_PORT") as refused:
        place_here({key: value for key, value in TORCHRUN.items() if key != "MASTER_PORT"})
    assert "unset RANK WORLD_SIZE" in str(refused.value)  # a shell may have them from elsewhere


def test_a_command_that_is_started_again_takes_its_files_in_once(tmp_path: Path) -> None:
    """The ledger knows what the starts before have taken in; refused files, and those of other commands, are taken."""
    environment = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "one"}
    later = {**environment, "TORCHELASTIC_RESTART_COUNT": "1"}
    other = {**later, "TORCHELASTIC_RUN_ID": "two"}
    assert start_here({}) is None
    layout = made_up_run(tmp_path / "run", [("old.jsonl", 1)], lambda _: 1.0)
    taken: list[str] = []

    def take(paths: Sequence[Path], *, again: bool, intent: int) -> None:
        if not (tmp_path / "mended").exists():
            raise FileRejected("1 file was refused")
        assert again
        ledger.end_intent(intent)
        taken.extend(path.name for path in paths)

    def begin(variables: dict[str, str], name: str) -> Given:
        given = Given(ledger, start_here(variables), [tmp_path / name], again=True)
        with given.recorded():
            given.take(take)
        return given

    with Ledger(layout.ledger) as ledger:
        with pytest.raises(FileRejected):
            begin(environment, "a.jsonl")
        (tmp_path / "mended").touch()
        begin(later, "a.jsonl")
        add_file(ledger, "a.jsonl", state="done", position=2)
        assert {2} == begin(later, "a.jsonl").done()
        assert ["a.jsonl"] == taken
        assert set() == begin(other, "b.jsonl").done()
        begin(environment, "c.jsonl")
        assert ["a.jsonl", "b.jsonl", "c.jsonl"] == taken
        assert [] == ledger.intents()


@pytest.mark.parametrize(
    ("text", "gpus", "expected"),
    [
        ("2", None, Devices(2, 2)), ("all", None, Devices(1, 1)), ("all", 8, Devices(8, 8)), ("2:8", 4, Devices(2, 4)),
        ("2:8", None, Devices(2, 8)), ("0", None, "1 or more"), ("3:2", None, "goes down"), ("x", None, "not a number"),
        ("2:1025", None, "at most 1,024"), ("2:1025", 4, Devices(2, 4)),
        ("2:", None, Devices(2, 2)), ("-1", 8, "1 or more"), ("9", 8, "this machine has 8 GPUs, not 9"),
        ("2:4", 1, "this machine has 1 GPU, not 2"), ("1.5", None, "not a number"),
    ],
)  # fmt: skip
def test_how_many_devices(text: str, gpus: int | None, expected: Devices | str) -> None:
    """A number, all, or bounds that the machine can meet; anything else is refused with the ways to say it."""
    if isinstance(expected, Devices):
        assert expected == read_devices(text, lambda: gpus)
        return
    with pytest.raises(UsageError, match=expected) as refused:
        read_devices(text, lambda: gpus)
    assert "--devices 2:8" in str(refused.value)


@pytest.mark.slow
def test_only_who_can_use_the_gpus_is_forked() -> None:
    """If a process that is forked cannot do as it is asked, such as use CUDA, each one imports by itself."""
    apart(as_it_is)  # let the process begin that others are forked from
    assert ["forkserver", "spawn"] == [start_method(partial(sys.exit, status)) for status in (0, 1)]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 9))
def test_shares_have_all_rows_once(lengths: list[int], count: int) -> None:
    """Each row is in one share, in its order there; shares differ by one row at most, and none is empty."""
    shares = shares_of(batch(lengths), count)
    places = [share.lines for share in shares]
    assert list(range(len(lengths))) == sorted(place for own in places for place in own)
    assert all(own == sorted(own) for own in places)
    assert min(count, len(lengths)) == len(shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_have_about_as_many_tokens() -> None:
    """Rows are dealt to and fro, the longest first, so that no device waits long for another.

    Which share a row is in decides last bits, so a run that goes on under a later release needs the same shares.
    """
    assert [60, 60] == [share.tokens for share in shares_of(batch([50, 40, 20, 10]), 2)]
    shares = shares_of(batch([7, 30, 20, 12, 5, 9, 31, 8]), 3)
    assert [[0, 6, 7], [1, 4, 5], [2, 3]] == [share.lines for share in shares]


@pytest.mark.parametrize(("cut", "counts"), [("auto", (6, 6)), (1, (4, 1)), (4, (4, 4)), (16, (8, 8))])
def test_parts_of_shares(cut: object, counts: tuple[int, int]) -> None:
    """Parts are those of a share, cut as a step is, into as many as asked for; one share is the step as it was."""
    rows = batch([7, 30, 20, 12, 5, 9, 31, 8])
    config = Config.model_validate({"gradient_accumulation": cut, "micro_batch_tokens": 32, "parts": 4})
    parts = parts_of(rows, config, 5)
    assert sorted({part.share for part in parts}) == [0, 1, 2, 3]
    assert [part.share for part in parts] == sorted(part.share for part in parts)
    assert len({part.seed for part in parts}) == len(parts)
    whole = parts_of(rows, config.model_copy(update={"parts": 1}), 5)
    assert {0} == {part.share for part in whole}
    assert list(range(len(rows))) == [place for part in whole for place in part.batch.lines]
    assert counts == (len(parts), len(whole))
    assert config.most_parts >= len(parts)


def test_a_plan_is_told_whole() -> None:
    """A plan sent to another rank has the same rows in every step, including replayed ones."""
    own = FilePlan("ab", 20, 4, 2, 7, 1, (3, 9))
    earlier = (Source("cd", 5, (1,), 2.0), Source("ef", 7))
    for plan in (own, ReplayPlan(own, earlier, 0.5, True, "key")):
        told = plan_told(plan_message(plan))
        assert plan == told
        assert [plan.rows_at(step) for step in range(plan.steps)] == [told.rows_at(step) for step in range(told.steps)]


OWN = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OnwardError)]


@pytest.mark.parametrize("kind", OWN)
def test_an_error_of_one_rank_has_its_kind_on_the_others(kind: type[OnwardError]) -> None:
    """The others raise the same class, which decides the exit status, with place and hint, and name the rank; only an
    error with facts of its own comes as a plain one."""
    error = GuardRejected("wrong", 3, []) if kind is GuardRejected else kind("wrong", where="key", hint="mend it")
    found: Any = from_message(2, json.loads(json.dumps(to_message(error))))
    assert (OnwardError if kind is GuardRejected else kind) is type(found)
    assert ("rank 2: wrong", error.where, error.hint) == (found.what, found.where, found.hint)
    assert error.exit_status == found.exit_status


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.ENOMEM, "no"), torch.OutOfMemoryError, "rank 2: [Errno 12] no"),
        (RuntimeError("CUDA error: gone\nand more"), DeviceLost, "rank 2: the GPU was lost: CUDA error: gone"),
        (KeyError("a"), RuntimeError, "rank 2: KeyError: 'a'"),
        (ValueError(), RuntimeError, "rank 2: ValueError: ValueError"),
    ],
)  # fmt: skip
def test_a_foreign_error_of_one_rank_says_on_the_others_what_it_was(
    error: Exception, kind: type[Exception], text: str
) -> None:
    """Lack of memory and a lost GPU are handled there as here; anything else is an error that names its class."""
    found = from_message(2, json.loads(json.dumps(to_message(error))))
    assert (kind, text) == (type(found), str(found))


@dataclass(frozen=True)
class Several:
    """A world of some ranks, as far as its size is asked."""

    size: int
    is_uniform: bool = True


def test_what_keeps_ranks_from_the_bits_of_one() -> None:
    """Ranks that differ, and a fast exchange between several, promise no bits; one rank always has those of one."""
    one: Any = SingleProcess(torch.device("cpu"))
    two: Any = Several(2)
    unequal: Any = Several(2, is_uniform=False)
    assert [{}, {}] == [ranks_facts(one, "fast"), ranks_facts(two, "exact")]
    assert {"exchange": "fast"} == ranks_facts(two, "fast")
    assert {"ranks": "unequal"} == ranks_facts(unequal, "exact")
    assert [True, False, False] == [
        promises_bits({"device": "cpu", **facts})
        for facts in (ranks_facts(two, "exact"), ranks_facts(two, "fast"), ranks_facts(unequal, "exact"))
    ]


def meet_all(store: Any, said: list[str], *, late: int) -> list[tuple[str, list[str]]]:
    """Have ranks meet on a store, one of them after the others; returns the name of the group and what all said."""
    with ThreadPoolExecutor() as pool:
        met: dict[int, Future[tuple[str, list[dict[str, Any]]]]] = {}
        for rank in sorted(range(len(said)), key=lambda rank: rank == late):
            met[rank] = pool.submit(meet, store, (rank, len(said)), {"said": said[rank]}, 30.0)
        found = [met[rank].result() for rank in range(len(said))]
    return [(name, [each["said"] for each in records]) for name, records in found]


@pytest.mark.parametrize("late", [0, 2])
def test_processes_of_a_start_meet_each_other(late: int) -> None:
    """torchrun keeps one store for all starts: what earlier ones wrote, all or some of it, is not taken for new. A wish
    to end is heard while others are waited for."""
    store = torch.distributed.HashStore()
    names = set[str]()
    for said in (["a", "b", "c"], ["d", "e", "f"], ["g", "h"], ["i", "j", "k", "l"]):
        found = meet_all(store, said, late=min(late, len(said) - 1))
        assert [said] * len(said) == [each for _, each in found]
        names |= {name for name, _ in found}
    assert 4 == len(names)
    with pytest.raises(RankLost, match="rank 1, rank 2 did not join within 0 s"):
        meet(store, (0, 3), {}, 0.1)
    with pytest.raises(RankLost, match="did not join within 0 s"):
        meet(store, (2, 3), {}, 0.1)
    wishes = Wishes()
    wishes.ask("SIGTERM")
    for rank in (0, 2):
        with pytest.raises(Stopped):
            meet(store, (rank, 3), {}, 30.0, wishes.check_for_end)
    assert [["m", "n", "o"]] * 3 == [each for _, each in meet_all(store, ["m", "n", "o"], late=late)]


def test_torchrun_reads_the_command_of_the_documentation() -> None:
    """torchrun takes options of what it starts for its own where they begin like one: `--run` does."""
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    (command,) = (block for block in text.split("```") if block.startswith("sh\ntorchrun"))
    read = get_args_parser().parse_args(shlex.split(command.removeprefix("sh\n").replace("\\\n", " "))[1:])
    assert ("onward", ["watch", "--run", "my-run"]) == (read.training_script, read.training_script_args)
