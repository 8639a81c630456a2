"""The process behind the page that answers questions: started once, ended, and started again if it died."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import copy_run

from onward import Run

pytest.importorskip("uvicorn")

from onward.errors import ModelError, UsageError
from onward.layout import RunLayout
from onward.views.page import answering
from onward.views.page.talking import MOST_TOKENS, MOST_TURNS, Talker, require_wish
from onward.views.web.connections import incoming

ANSWERS = """
import json, os, sys
cancelled = []
for line in sys.stdin:
    wish = json.loads(line)
    if "cancel" in wish:
        cancelled.append(wish["cancel"])
        continue
    text = wish["messages"][-1]["content"]
    if text == "die":
        sys.exit(1)
    if text == "babble":
        print("Loading...", flush=True)
        continue
    print(json.dumps({"id": wish["id"], "text": "a piece"}), flush=True)
    done = {"process": os.getpid(), "session": os.getsid(0), "cancelled": cancelled, "wish": wish}
    if text != "wait":
        print(json.dumps({"id": wish["id"], **({"error": "no"} if text == "fail" else {"done": done})}), flush=True)
"""
"""A process that answers at once, with its number, with what was cancelled, and with the wish."""


async def told(talker: Talker, text: str, **values: Any) -> dict[str, Any]:
    """Return what came of a question at its end."""
    pieces = [piece async for piece in talker.ask({"messages": [{"role": "user", "content": text}], **values})]
    assert [{"text": "a piece"}] == pieces[:-1]
    return pieces[-1]


async def asked(talker: Talker, text: str) -> Any:
    """Return the process that answered a question, which Ctrl-C in the page's terminal does not reach."""
    done = (await told(talker, text))["done"]
    assert done["process"] == done["session"]
    return done["process"]


@pytest.mark.parametrize("end", ["die", "babble"])
def test_one_process_answers_all_and_another_where_it_ended(tmp_path: Path, end: str) -> None:
    """Two columns that ask at once share a process; where it dies, or says what is no answer, those who wait are told,
    and the next question gets another.
    """

    async def talk() -> tuple[list[int], int]:
        talker = Talker(RunLayout(tmp_path), (sys.executable, "-c", ANSWERS))
        try:
            both = await asyncio.gather(asked(talker, "Hello"), asked(talker, "Hello"))
            with pytest.raises(ModelError, match="ended"):
                await asked(talker, end)
            return both, await asked(talker, "Hello")
        finally:
            await talker.end()

    both, another = asyncio.run(talk())
    assert both[0] == both[1] != another


def test_the_end_of_a_process_in_the_middle_of_a_question_is_its_end(tmp_path: Path) -> None:
    """One that dies before it has read all of a long conversation, of a lack of memory say, ended like any other."""

    async def talk() -> None:
        talker = Talker(RunLayout(tmp_path), (sys.executable, "-c", "import sys; sys.stdin.buffer.raw.read(1)"))
        try:
            with pytest.raises(ModelError, match="the process that answers has ended"):
                await asked(talker, "x" * (1 << 20))
        finally:
            await talker.end()

    asyncio.run(talk())


def test_what_libraries_print_is_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    """Only the process itself writes to what was its standard output; the rest goes to standard error."""
    before = os.dup(1)
    try:
        with answering.own_output() as out:
            os.write(1, b"from C")
            out.write("an answer")
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert ("an answer", "from C") == tuple(capfd.readouterr())


def test_an_answer_that_nobody_waits_for_is_cancelled(tmp_path: Path) -> None:
    """A browser that goes away ends its answer, and no other; one that has its answer, or a failure, ends nothing."""

    async def talk() -> tuple[dict[str, Any], dict[str, Any]]:
        talker = Talker(RunLayout(tmp_path), (sys.executable, "-c", ANSWERS))
        try:
            await told(talker, "Hello")
            leaves = talker.ask({"messages": [{"role": "user", "content": "wait"}]})
            assert {"text": "a piece"} == await anext(leaves)
            await leaves.aclose()
            return await told(talker, "fail"), await told(talker, "Hello")
        finally:
            await talker.end()

    failed, last = asyncio.run(talk())
    assert ({"error": "no"}, [2]) == (failed, last["done"]["cancelled"])


async def what_is_due() -> None:
    """Let the loop do what it is to do by now."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_process_ends_when_nobody_asks(tmp_path: Path) -> None:
    """It frees its memory after a while without a question, but not while one is being answered."""

    async def talk() -> tuple[Any, Any, Any]:
        talker = Talker(RunLayout(tmp_path), (sys.executable, "-c", ANSWERS), idle=0.0)
        try:
            waits = talker.ask({"messages": [{"role": "user", "content": "wait"}]})
            await anext(waits)
            one = await asked(talker, "Hello")
            await what_is_due()
            same = await asked(talker, "Hello")
            await waits.aclose()
            await what_is_due()
            return one, same, await asked(talker, "Hello")
        finally:
            await talker.end()

    one, same, other = asyncio.run(talk())
    assert one == same != other


def test_what_is_wished_reaches_the_process_and_no_more(tmp_path: Path) -> None:
    """Each setting does, up to its limits; what else a message says is left out."""
    limits: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 1, "seed": -(2**63), "at": "a.jsonl", "system": "Be brief."},
        {"temperature": 100.0, "max_tokens": MOST_TOKENS, "seed": 2**63 - 1},
        {"temperature": None, "at": None},
    ]
    turns = [{"role": "assistant", "content": "x", "name": "n"}] * (MOST_TURNS - 1)
    wishes = [require_wish({"messages": [*turns, {"role": "user", "content": "y"}], **values}) for values in limits]
    messages = [*[{"role": "assistant", "content": "x"}] * (MOST_TURNS - 1), {"role": "user", "content": "y"}]
    assert [{**values, "messages": messages} for values in (*limits[:2], {})] == wishes
    with pytest.raises(UsageError, match="messages must be 1 to"):
        require_wish({"messages": [*turns, *turns[:1], {"role": "user", "content": "y"}]})
    for wrong in ({"role": "system", "content": "x"}, {"role": "user"}, {"role": "user", "content": ["x"]}, "x"):
        with pytest.raises(UsageError, match="objects with role and content"):
            require_wish({"messages": [*turns[:1], wrong, {"role": "user", "content": "y"}]})


def test_whatever_a_wish_does_the_next_one_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wish that fails in an unforeseen way gets an error, and the process lives on."""
    wishes = [json.dumps({"id": number, "at": ["no name"]}) for number in (1, 2)]  # no such wish passes the page
    answering.Answering(RunLayout(tmp_path), sys.stdout).run(iter(wishes))
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [1, 2] == [answer["id"] for answer in told]
    assert all("cannot be answered" in answer["error"] for answer in told)


@pytest.mark.parametrize("at", [None, "step:5"])
def test_what_was_trained_again_answers_as_it_is_now(
    stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], at: str | None
) -> None:
    """After a rollback another file leads to the same step: the state that is kept in memory is not asked for it. More
    states than are kept answer, too."""
    run = Run(copy_run(stream, tmp_path / "run"))
    wish = {"at": at, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0.0}

    def label() -> Any:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            last = (capsys.readouterr().out.splitlines() or ["{}"])[-1]
            if "text" not in (answer := json.loads(last)) and answer:
                return answer["done"]["label"]
            time.sleep(0.01)
        raise TimeoutError

    labels: list[str] = []

    def wishes() -> Iterator[str]:
        for number, other in enumerate(("c.jsonl", "step:3", at)):
            yield json.dumps({"id": -number, **wish, "at": other})
            labels.append(label())
        run.rollback("step:3")
        run.train(tiny.write_jsonl(tmp_path / "d.jsonl", tiny.chat_rows(8, seed=9)))
        yield json.dumps({"id": 2, **wish})
        labels.append(label())

    answering.Answering(run.layout, sys.stdout).run(wishes())
    first, second = "step 5, after file 3 (c.jsonl)", "step 3, after file 2 (b.jsonl)"
    assert [first, second, first, "step 5, after file 3 (d.jsonl)"] == labels


def test_a_body_of_which_nothing_comes_is_given_up() -> None:
    """What came is passed on; a sender that fell silent in the middle is not waited for without end."""

    async def stalled() -> AsyncGenerator[bytes]:
        yield b"a"
        await asyncio.Event().wait()

    async def read() -> bytes:
        pieces = incoming(stalled(), seconds=0.01)
        first = await anext(pieces)
        with pytest.raises(UsageError, match="nothing came"):
            await anext(pieces)
        return first

    assert b"a" == asyncio.run(read())
