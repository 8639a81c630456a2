"""The process behind the page that answers questions: started once, ended, and started again where it died."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from onward.errors import ModelError
from onward.layout import RunLayout
from onward.views.page.talking import Talker

ANSWERS = """
import json, os, sys
for line in sys.stdin:
    wish = json.loads(line)
    if "cancel" in wish:
        continue
    if wish["messages"][-1]["content"] == "die":
        sys.exit(1)
    print(json.dumps({"id": wish["id"], "text": "a piece"}), flush=True)
    print(json.dumps({"id": wish["id"], "done": {"process": os.getpid()}}), flush=True)
"""
"""A process that answers at once, with its number."""


async def asked(talker: Talker, text: str) -> Any:
    """Return what came of a question."""
    pieces = [piece async for piece in talker.ask({"messages": [{"role": "user", "content": text}]})]
    assert [{"text": "a piece"}] == pieces[:-1]
    return pieces[-1]["done"]["process"]


def test_one_process_answers_all_and_another_where_it_died(tmp_path: Path) -> None:
    """Two columns that ask at the same moment share a process; its death is told, and the next question has another."""

    async def talk() -> tuple[list[int], int]:
        talker = Talker(RunLayout(tmp_path), (sys.executable, "-c", ANSWERS))
        try:
            both = await asyncio.gather(asked(talker, "Hello"), asked(talker, "Hello"))
            with pytest.raises(ModelError, match="ended"):
                await asked(talker, "die")
            return both, await asked(talker, "Hello")
        finally:
            await talker.end()

    both, another = asyncio.run(talk())
    assert both[0] == both[1] != another
