from typing import Any

import pytest

from onward.data.row_types import Chat, Completion, RowError, Text
from onward.data.rows.records import parse_record

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
HALF = "contains half of a surrogate pair, which is not a character"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER], "id": 7}, Chat([USER, ANSWER], ignored=("id",))),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, Chat([USER, ANSWER], [{"name": "f"}])),
        ({"messages": None, "text": "good"}, Text("good")),
        ({"prompt": "a", "text": "good"}, Text("good", ("prompt",))),
        ({"messages": [USER, ANSWER], "text": "other"}, Chat([USER, ANSWER], ignored=("text",))),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            Chat([USER, ANSWER]),
        ),
        ({"conversations": [USER, ANSWER]}, Chat([USER, ANSWER])),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "bot", "value": "Hello"}], "system": "S"},
            Chat([{"role": "system", "content": "S"}, USER, ANSWER]),
        ),
        ({"prompt": "2+2=", "completion": "4"}, Completion("2+2=", "4")),
        ({"prompt": "", "completion": "4"}, Completion("", "4")),
        ({"prompt": [USER], "completion": [ANSWER]}, Chat([USER, ANSWER])),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, Chat([USER, ANSWER])),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "system": "S"},
            Chat(
                [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Add\n\n1 2"},
                    {"role": "assistant", "content": "3"},
                ]
            ),
        ),
        ({"text": " as is \n"}, Text(" as is \n")),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                    ANSWER,
                ]
            },
            Chat([USER, ANSWER]),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ANSWER]},
            Chat([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, ANSWER]),
        ),
        (
            {"messages": [USER, {**ANSWER, "thinking": "hm", "name": None, "weight": 1}]},
            Chat([USER, {**ANSWER, "reasoning_content": "hm", "thinking": "hm"}]),
        ),
    ],
)
def test_accepted_rows(row: dict[str, Any], expected: object) -> None:
    """Each format is recognised by its keys; nulls and unknown keys do not count."""
    assert expected == parse_record(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "the row is a list, not an object"),
        ("text", "the row is a string, not an object"),
        ({"id": 3, "body": "x"}, 'no known row format (keys with a value: "id", "body")'),
        ({}, "no known row format (keys with a value: none)"),
        ({"prompt": "x"}, 'the row has "prompt" but no "completion"'),
        ({"prompt": "x", "completion": None}, 'the row has "prompt" but no "completion"'),
        ({"instruction": "x"}, 'the row has "instruction" but no "output"'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": "x"}, '"messages" is a string, not a list'),
        ({"messages": ["x"]}, '"messages" holds a string at place 1'),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has the unknown role 'robot'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1 has the unknown role ['user']"),
        ({"messages": [{"content": "x"}]}, "message 1 has the unknown role None"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown \"from\": 'alien'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "unknown \"from\": ['gpt']"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 1 has no content"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "the content of message 1 is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            "message 1 contains a part of type 'image': only text is trained",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 has no content"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "the answer in message 2 is empty"),
        ({"messages": [USER]}, "the chat has no assistant turn"),
        ({"messages": [USER, ANSWER, USER]}, "the last message is the user's: the answer is missing"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "the answer in message 2 " + HALF),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{**CALL, "a": "\udc00"}]}]}, "message 2 " + HALF),
        ({"messages": [USER, ANSWER], "tools": "a"}, '"tools" cannot be read as JSON'),
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": "x", "completion": [ANSWER]}, '"prompt" is a string and "completion" is a list'),
        ({"instruction": "x", "output": 3}, '"output" is a number, not a string'),
        ({"instruction": "x", "output": ""}, "the answer in message 2 is empty"),
        ({"text": "  "}, "text is empty"),
        ({"text": True}, '"text" is a boolean, not a string'),
        ({"text": "a\udfff"}, "text " + HALF),
        ({"messages": [USER, {"role": "assistant", "content": "\u200b \ufeff"}]}, "the answer in message 2 is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]},
            "message 2 contains a part of type 'tool_use'",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": 1e999}'}]}]},
            "one of the arguments of 'f' in message 2 holds inf, which JSON does not know",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]}]},
            "in the arguments of 'f' in message 2, the key 'x' occurs twice in an object",
        ),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "a tool of the row cannot be read as JSON"),
    ],
)
def test_refused_rows(row: Any, reason: str) -> None:
    """A row that cannot be trained on is refused with its reason and a remedy."""
    with pytest.raises(RowError) as refusal:
        parse_record(row)
    assert reason == refusal.value.reason
    assert refusal.value.remedy


def test_calls_of_an_answer_without_content_are_kept() -> None:
    """An assistant's turn of two keys may be a role and calls of tools, which are a part of it too."""
    calls = [{"function": {"name": "time", "arguments": {}}}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": calls}]
    record = parse_record({"messages": turns})
    assert isinstance(record, Chat)
    assert calls == record.messages[1]["tool_calls"]
