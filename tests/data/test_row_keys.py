"""Keys with a known meaning are followed or refused, in every shape in which rows bring them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onward.data.row_types import Chat, Completion, RowError, Text
from onward.data.rows.columns import Columns
from onward.data.rows.records import parse_record

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "S"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "R"}
THOUGHT = "<think>\nhm\n</think>\n\nHello"
PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    """Return ShareGPT's turns."""
    return [{"from": role, "value": text} for role, text in said]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER], "system": "S"}, Chat([SYSTEM, USER, ANSWER])),
        ({"messages": [USER, ANSWER], "system_prompt": "S"}, Chat([SYSTEM, USER, ANSWER])),
        ({"messages": [USER, ANSWER], "system": [{"type": "text", "text": "S"}]}, Chat([SYSTEM, USER, ANSWER])),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "S"}, Chat([SYSTEM, USER, ANSWER])),
        ({"messages": [USER, ANSWER], "system": ""}, Chat([USER, ANSWER])),
        (
            {"messages": [{**SYSTEM, "content": [{"type": "text", "text": "S"}]}, USER, ANSWER], "system": "S"},
            Chat([SYSTEM, USER, ANSWER]),
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": "", "function_call": " "}], "chat_template_kwargs": ""},
            Chat([USER, ANSWER]),
        ),
        ({"instruction": "Hi", "output": "Hello", "history": " ", "tools": ""}, Chat([USER, ANSWER])),
        ({"messages": json.dumps([USER, ANSWER])}, Chat([USER, ANSWER])),
        ({"messages": turns(("human", "Hi"), ("gpt", "Hello"))}, Chat([USER, ANSWER])),
        (
            {"messages": [{"role": "human", "content": "Hi"}, {"role": "model", "content": "Hello"}]},
            Chat([USER, ANSWER]),
        ),
        ({"conversations": [USER, ANSWER], "tools": "[]"}, Chat([USER, ANSWER])),
        ({"messages": [USER, {**ANSWER, "tool_calls": []}]}, Chat([USER, ANSWER])),
        (
            {"messages": [USER, {**ANSWER, "weight": 1}, USER, {**ANSWER, "weight": 0}]},
            Chat([USER, ANSWER, USER, ANSWER], untrained=frozenset({3})),
        ),
        (
            {"messages": [USER, {**ANSWER, "train": False}, USER, ANSWER]},
            Chat([USER, ANSWER, USER, ANSWER], untrained=frozenset({1})),
        ),
        (
            {"messages": [USER, {**ANSWER, "loss": False}, USER, {**ANSWER, "loss_weight": 1.0}]},
            Chat([USER, ANSWER, USER, ANSWER], untrained=frozenset({1})),
        ),
        ({"messages": [{**USER, "training": False}, {**ANSWER, "training": True}]}, Chat([USER, ANSWER])),
        ({"messages": [USER, ANSWER], "weight": 1, "label": True}, Chat([USER, ANSWER])),
        ({"messages": [USER, ANSWER], "label": "math"}, Chat([USER, ANSWER], ignored=("label",))),
        ({"prompt": PAIR, "completion": [USER, ANSWER]}, Chat([*PAIR, USER, ANSWER], untrained=frozenset({1}))),
        ({"instruction": "Hi", "output": "Hello", "history": [["Q", "A"]]}, Chat([*PAIR, USER, ANSWER])),
        ({"instruction": "Hi", "output": "Hello", "history": []}, Chat([USER, ANSWER])),
        ({"messages": [USER, ANSWER], "tools": '[{"name": "f"}]'}, Chat([USER, ANSWER], [{"name": "f"}])),
        ({"messages": [USER, ANSWER], "tools": ['{"name": "f"}']}, Chat([USER, ANSWER], [{"name": "f"}])),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"x": 1}}, Chat([USER, ANSWER], arguments={"x": 1})),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"a": 1}}},
                ]
            },
            Chat([USER, CALLS]),
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}]},
            Chat([USER, CALLS]),
        ),
        (
            {"messages": [USER, CALLS, {"role": "function", "content": "R"}, ANSWER]},
            Chat([USER, CALLS, RESULT, ANSWER]),
        ),
        (
            {
                "conversations": turns(
                    ("human", "Hi"),
                    ("function_call", '{"name": "f", "arguments": {"a": 1}}'),
                    ("observation", "R"),
                    ("gpt", "Hello"),
                )
            },
            Chat([USER, CALLS, RESULT, ANSWER]),
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "value": "Hi"}]}, ANSWER]}, Chat([USER, ANSWER])),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hello"}],
                    },
                ]
            },
            Chat([USER, {**ANSWER, "reasoning_content": "hm", "thinking": "hm"}]),
        ),
        ({"prompt": "a", "completion": "b", "label": True, "id": 1}, Completion("a", "b", ("id",))),
        ({"prompt": "a", "completion": "b", "kto_tag": 1, "label": "math"}, Completion("a", "b", ("label",))),
        ({"prompt": json.dumps(PAIR[:1]), "completion": json.dumps(PAIR[1:])}, Chat(PAIR)),
        ({"prompt": "[1, 2]", "completion": "[3]", "weight": "1.0"}, Completion("[1, 2]", "[3]")),
        (
            {"messages": [USER, {**ANSWER, "train": "False"}, USER, {**ANSWER, "weight": ""}]},
            Chat([USER, ANSWER, USER, ANSWER], untrained=frozenset({1})),
        ),
        (
            {
                "messages": [
                    USER,
                    {**ANSWER, "weight": 0.5, "train": True},
                    USER,
                    {**ANSWER, "weight": "2"},
                    USER,
                    ANSWER,
                ]
            },
            Chat([USER, ANSWER] * 3, weights={1: 0.5, 3: 2.0}),
        ),
        (
            {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 3}, USER, ANSWER], "weight": 0.5},
            Chat([USER, ANSWER] * 3, untrained=frozenset({1}), weights={3: 1.5, 5: 0.5}),
        ),
        ({"text": "a", "loss_weight": "0.25"}, Text("a", weight=0.25)),
        ({"prompt": "a", "completion": "b", "weight": 2}, Completion("a", "b", weight=2.0)),
        ({"messages": [USER, ANSWER], "tools": " "}, Chat([USER, ANSWER])),
        (
            {"messages": [USER, ANSWER], "functions": [{"name": "f"}]},
            Chat([USER, ANSWER], [{"type": "function", "function": {"name": "f"}}]),
        ),
        (
            {"messages": [USER, {**ANSWER, "content": THOUGHT, "thinking": ""}]},
            Chat([USER, {**ANSWER, "content": THOUGHT}]),
        ),
        ({"text": "a", "tools": "[]", "history": []}, Text("a", ("tools", "history"))),
        ({"text": "a", "label": "0"}, Text("a", ("label",))),
        ({"text": "a", "label": 0}, Text("a", ("label",))),
        ({"text": "a", "tokens": 512}, Text("a", ("tokens",))),
    ],
)
def test_followed(row: dict[str, Any], expected: object) -> None:
    """What a key means is done; a key without a meaning is named."""
    assert expected == parse_record(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, 'the row has "chosen": Onward does not train on preferences'),
        (
            {"messages": [USER, ANSWER], "rejected": ANSWER},
            'the row has "rejected": Onward does not train on preferences',
        ),
        ({"prompt": "a", "completion": "b", "label": False}, '"label" is false: the answer is labelled as bad'),
        ({"messages": [USER, ANSWER], "label": 0}, '"label" is 0: the answer is labelled as bad'),
        ({"prompt": "a", "completion": "b", "label": "0"}, '"label" is "0": the answer is labelled as bad'),
        ({"text": "a", "label": "False"}, '"label" is "False": the answer is labelled as bad'),
        ({"text": "a", "system": "S"}, '"system" stands next to plain text'),
        ({"text": "a", "tools": [{"name": "f"}]}, '"tools" stands next to plain text'),
        ({"messages": [USER, ANSWER], "history": [["a", "b"]]}, '"history" stands next to messages'),
        ({"prompt": [USER], "completion": [ANSWER], "history": [["a", "b"]]}, '"history" stands next to messages'),
        (
            {"messages": [USER, ANSWER], "tools": [{"name": "f"}], "functions": [{"name": "f"}]},
            "the row has both tools and functions",
        ),
        (
            {"messages": [USER, {**ANSWER, "content": THOUGHT, "thinking": "hm"}]},
            "message 2 has a thought both in its content and next to it",
        ),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, 'the row has "images": only text is trained'),
        ({"messages": [USER, {**ANSWER, "audio": {"id": 1}}]}, 'message 2 has "audio": only text is trained'),
        ({"input_ids": [1, 2], "labels": [1, 2]}, 'the row has "input_ids": it is already tokenized'),
        ({"tokens": [1, 2]}, 'the row has "tokens": it is already tokenized'),
        ({"messages": [USER, {**ANSWER, "weight": -0.5}]}, '"weight" of message 2 is -0.5'),
        ({"messages": [USER, {**ANSWER, "weight": float("nan")}]}, '"weight" of message 2 is nan'),
        ({"text": "a", "loss_weight": 1e9}, '"loss_weight" of the row is 1000000000.0'),
        ({"text": "a", "loss_weight": 1e-320}, '"loss_weight" of the row is 1e-320'),
        (
            {"messages": [USER, {**ANSWER, "weight": 0.5, "loss_weight": 2}]},
            'message 2 has two weights: "weight" 0.5 and "loss_weight" 2',
        ),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, '"train" of message 2 is a string'),
        (
            {"messages": [{**USER, "train": True}, ANSWER]},
            "message 1 puts a text of the user into the loss, which covers only answers",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no answer of the chat is in the loss: each has the weight 0"),
        ({"messages": [USER, ANSWER], "weight": 0}, "the row has the weight 0: none of it is in the loss"),
        ({"text": "a", "train": False}, "the row has the weight 0: none of it is in the loss"),
        (
            {"messages": [USER, {**ANSWER, "train_detail": [1]}]},
            'message 2 has "train_detail": parts of a message cannot have weights',
        ),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "T"}, "the row has two different system texts"),
        ({"prompt": "a", "completion": "b", "system": "S"}, '"system" stands next to a prompt that is plain text'),
        ({"instruction": "a", "output": "b", "history": "x"}, '"history" cannot be read as JSON'),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, '"history" is not a list of pairs of strings'),
        (
            {"messages": [USER, {"role": "function_call", "content": "f(a)"}]},
            "the call in message 2 cannot be read as JSON",
        ),
        (
            {"messages": [USER, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "the arguments of 'f' in message 2 cannot be read as JSON",
        ),
        ({"messages": [USER, {**CALLS, "tool_calls": [{"id": "1"}]}]}, "a call in message 2 has no name"),
        ({"messages": [USER, {**ANSWER, "thinking": "a", "reasoning": "b"}]}, "message 2 has two different thoughts"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"tools": []}}, '"chat_template_kwargs" sets "tools"'),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": 5}, '"chat_template_kwargs" is a number'),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": '["a"]'}, '"chat_template_kwargs" is a list'),
    ],
)
def test_refused(row: dict[str, Any], reason: str) -> None:
    """A key whose meaning cannot be followed is refused by its name, with what to do."""
    with pytest.raises(RowError) as refusal:
        parse_record(row)
    assert reason == refusal.value.reason
    assert refusal.value.remedy


def test_arguments_in_text_keep_their_white_space() -> None:
    """A template may write the text of the arguments as it is, so that it is what the row has to the last character."""
    text = '{"city":  "Rome"}'
    call = {"type": "function", "function": {"name": "f", "arguments": text}}
    record = parse_record({"messages": [USER, {**CALLS, "tool_calls": [call]}]})
    assert isinstance(record, Chat)
    assert text == record.messages[1]["tool_calls"][0]["function"]["arguments"]


def test_a_thought_that_is_there_twice_is_one() -> None:
    """The same thought under several keys and in a part of the content is thought once; another one is refused."""
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hello"}]
    answer = {"role": "assistant", "content": parts, "reasoning": "hm", "reasoning_content": "hm"}
    record = parse_record({"messages": [USER, answer]})
    assert isinstance(record, Chat)
    assert "hm" == record.messages[1]["reasoning_content"]
    for key in ("reasoning", "reasoning_content"):
        with pytest.raises(RowError, match="message 2 has two different thoughts"):
            parse_record({"messages": [USER, {**answer, key: "hm."}]})


def test_nulls_that_columns_pad() -> None:
    """Null fields of tools and arguments mean nothing in a row of Arrow, and what they say in JSON and its text."""
    arguments = {"city": "Rome", "n": None}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    tool = {"name": "f", "parameters": {"a": None, "b": 1}}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [tool]}
    texts = {key: json.dumps(value) for key, value in row.items()}
    whole = (arguments, {"a": None, "b": 1})
    cases = [(row, True, {"city": "Rome"}, {"b": 1}), (row, False, *whole), (texts, True, *whole)]
    for each, padded, given, schema in cases:
        record = parse_record(each, padded=padded)
        assert isinstance(record, Chat)
        assert given == record.messages[1]["tool_calls"][0]["function"]["arguments"]
        assert [{"name": "f", "parameters": schema}] == record.tools


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
            'the row has "preferred_output": Onward does not train on preferences',
        ),
        (
            {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
            'the row has several answers ("completions")',
        ),
        ({"question": "a", "answers": {"text": ["b"]}}, 'the row has several answers ("answers")'),
        (
            {"prompt": "a", "response_j": "b", "response_k": "c"},
            'the row has several answers ("response_j", "response_k")',
        ),
        ({"prompt": "a", "answer1": "b", "answer2": "c"}, 'the row has several answers ("answer1", "answer2")'),
        ({"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}, "the file is a table stored by columns"),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "the file is a table stored by columns"),
        ({"columns": ["text"], "index": [0], "data": [["a"]]}, "the file is a table stored by columns"),
        ({"question": ["a", "b"], "answer": ["c", "d"]}, "the file is a table stored by columns"),
        ({"segments": [{"label": True, "text": "a"}]}, 'no known row format (keys with a value: "segments")'),
        ({"contents": [{"role": "user", "parts": []}]}, 'no known row format (keys with a value: "contents")'),
        ({"train": [{"text": "a"}], "version": 1}, 'no known row format; "train" contains a list of objects'),
        ({"dialog": ["a", "b"], "act": ["c", "d"]}, 'no known row format (keys with a value: "dialog", "act")'),
        ({"system": [{"type": "image"}], "messages": [USER, ANSWER]}, "\"system\" contains a part of type 'image'"),
    ],
)
def test_rows_of_another_kind_are_told_what_they_are(row: dict[str, Any], reason: str) -> None:
    """Preferences of other tools, several answers, tables by columns: not that a key of a text is missing."""
    with pytest.raises(RowError) as refusal:
        parse_record(Columns().mapped(row))
    assert str(refusal.value).startswith(reason)
