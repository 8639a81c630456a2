"""What a client of OpenAI's interface may ask for: all that it says is followed, harmless, or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from onward.views.chat.sampling import Sampling
from onward.views.serve.requests import (
    FOLLOWED,
    MOST_TOKENS,
    NEUTRAL,
    UNRELATED,
    Asked,
    BadRequest,
    read_request,
)

MESSAGES = [{"role": "user", "content": "Hello"}]


def chat(**values: Any) -> Asked:
    """Return what a chat with these values asks for."""
    return read_request({"messages": MESSAGES, **values}, is_chat=True)


def completion(**values: Any) -> Asked:
    """Return what a text with these values asks for."""
    return read_request({"prompt": "Hello", **values}, is_chat=False)


def refused(ask: Any, **values: Any) -> tuple[str | None, str]:
    """Return the key that is blamed for a refusal, and its words."""
    with pytest.raises(BadRequest) as raised:
        ask(**values)
    return raised.value.param, str(raised.value)


def test_a_request_that_says_little_gets_the_defaults() -> None:
    """OpenAI's: a temperature of 1, everything drawn from; a seed of its own each time."""
    one, other = chat(), completion()
    assert Asked(list(MESSAGES), None, one.sampling, [], None, stream=False, with_usage=False) == one
    assert Asked(None, "Hello", other.sampling, [], None, stream=False, with_usage=False) == other
    for asked in (one, other):
        assert Sampling(1.0, 1.0, 0, MOST_TOKENS, asked.sampling.seed) == asked.sampling
    seeds = {chat().sampling.seed for _ in range(4)}
    assert (4, True) == (len(seeds), all(0 <= seed < 2**32 for seed in seeds))


def test_all_that_is_followed_is() -> None:
    """Each setting has its effect; the newer name of the most tokens goes before the older."""
    drawn = {"temperature": 0, "top_p": 0.5, "top_k": 7, "max_tokens": 9, "seed": -3}
    assert Sampling(0.0, 0.5, 7, 9, -3) == chat(**drawn).sampling == completion(**drawn).sampling
    assert 8 == chat(**drawn, max_completion_tokens=8).sampling.max_tokens
    assert 9 == chat(**drawn, max_completion_tokens=None).sampling.max_tokens
    assert [["a"], ["a", "b"], [], []] == [chat(stop=stop).stops for stop in ("a", ["a", "b"], [], None)]
    assert [True, False, False] == [chat(stream=stream).stream for stream in (True, False, None)]
    options: tuple[Any, ...] = ({"include_usage": True}, {"include_usage": False}, {"include_usage": None}, {}, None)
    assert not chat(stream_options={"include_obfuscation": False}).with_usage
    assert [True, False, False, False, False] == [chat(stream_options=given).with_usage for given in options]
    tools: list[Any] = [{"type": "function"}]
    assert [tools, None, None] == [chat(tools=given).tools for given in (tools, [], None)]
    assert ["a", "b"] == [completion(prompt=prompt).text for prompt in ("a", ["b"])]


def test_messages_reach_the_template_as_they_are() -> None:
    """Contents in parts are joined, what is null is left out, and what else a message has stays."""
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    given: list[dict[str, Any]] = [
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ]
    assert [
        {"role": "user", "content": "Hello", "name": "me"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ] == chat(messages=given).messages


@pytest.mark.parametrize("ask", [chat, completion])
@pytest.mark.parametrize("key", sorted({*NEUTRAL, *UNRELATED, *FOLLOWED} - {"messages", "prompt"}))
def test_a_key_of_openai_s_is_harmless_or_refused_by_its_name(key: str, ask: Any) -> None:
    """Null says nothing; a value that would change the answer in a way that is not supported is never ignored."""
    plain = ask(seed=1)
    if key != "seed":
        assert plain == ask(seed=1, **{key: None})
    for value in NEUTRAL.get(key, ()):
        assert plain == ask(seed=1, **{key: value})
    if key in NEUTRAL:
        opposites = [not value for value in NEUTRAL[key] if isinstance(value, bool)]
        for value in (2, "x", ["x"], {"x": 1}, *opposites):
            assert (key, f"{key} is not supported here") == refused(ask, **{key: value})
    elif key in UNRELATED:
        assert plain == ask(seed=1, **{key: "x"})
    elif key != "model":
        assert key == refused(ask, **{key: 1.5 if key not in ("temperature", "top_p") else "1"})[0]


def test_what_the_other_address_follows_is_refused() -> None:
    """A text has no tools, and a chat continues no text; what is empty says nothing, and so does what is null."""
    assert chat(seed=1) == chat(seed=1, min_p=None)
    assert ("prompt", "prompt is not supported at this address") == refused(chat, prompt="x")
    for key, value in (("messages", MESSAGES), ("tools", [{}])):
        assert (key, f"{key} is not supported at this address") == refused(completion, **{key: value})
    assert chat(seed=1) == chat(seed=1, prompt="")
    assert completion(seed=1) == completion(seed=1, messages=[], tools=[])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": {"role": "user"}}, "messages must be a list of messages"),
        ({"messages": [*MESSAGES, "x"]}, "messages[1] has no role"),
        ({"messages": [*MESSAGES, {"content": "x"}]}, "messages[1] has no role"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0] has no role"),
        ({"messages": [{"role": "user", "content": 5}]}, "the content of messages[0] is not a string"),
        *(
            ({"messages": [{"role": "user", "content": [part]}]}, "messages[0] contains something other than text")
            for part in ("x", {"type": "image_url", "text": "x"}, {"type": "text"}, {"type": "text", "text": 5}, {})
        ),
        ({"tools": {}}, "tools must be a list"),
        ({"tools": [{}, "x"]}, "tools must be objects"),
        ({"stop": [1]}, "stop must be a string or a list of strings"),
        ({"stop": {"a": 1}}, "stop must be a string or a list of strings"),
        ({"stream": 1}, "stream must be true or false"),
        ({"stream_options": True}, "stream_options must be an object"),
        ({"stream_options": {"include_usage": "no"}}, "include_usage must be true or false"),
        ({"stream_options": {"include_tokens": True}}, "include_tokens is not known here"),
        *(({key: True}, f"{key} must be a number") for key in ("temperature", "top_p")),
        *(
            ({key: True}, f"{key} must be a whole number")
            for key in ("top_k", "max_tokens", "max_completion_tokens", "seed")
        ),
        *(({key: 10**400}, f"{key} is too large") for key in ("temperature", "top_p")),
        ({"temperature": float("nan")}, "temperature cannot be nan: It is 0 to 100."),
        ({"top_p": 0}, "top_p cannot be 0.0"),
        ({"max_completion_tokens": 0}, "max_tokens cannot be 0"),
        ({"seed": 10**30}, "seed cannot be"),
        ({"x\ny" * 50: 1}, "is not known here"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], words: str) -> None:
    """The key is blamed, or the message, and the words can be printed."""
    param, said = refused(chat, **values)
    assert said.startswith(words) or said.endswith(words)
    assert (True, True) == (said.isprintable(), len(said) < 120)
    key = next(iter(values))
    assert param in {key, "messages[0]", "messages[1]", "include_usage", "include_tokens", "max_tokens"}


@pytest.mark.parametrize("prompt", [None, 5, [], ["a", "b"], [[1, 2]], [1, 2]])
def test_a_prompt_is_one_text(prompt: Any) -> None:
    """Lists of texts, and tokens, are not supported."""
    assert ("prompt", "prompt must be one string") == refused(completion, prompt=prompt)


@pytest.mark.parametrize("body", [None, 5, "x", [MESSAGES]])
def test_a_request_is_an_object(body: Any) -> None:
    """Nothing else has keys."""
    for is_chat in (True, False):
        with pytest.raises(BadRequest, match="not a JSON object"):
            read_request(body, is_chat=is_chat)
