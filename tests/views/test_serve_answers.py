"""OpenAI's interface over an engine that says what it is told: who is answered, in which shape, and its failures."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("starlette", reason="onward[serve] is not installed")

from onward.errors import ModelError, UsageError
from onward.views.chat.engine import Engine, Outcome, Reply
from onward.views.serve.app import LARGEST, Service
from onward.views.web.origin import Hosts

OUTCOME = Outcome("Hello", "length", prompt_tokens=7, tokens=2, seconds=0.5, label="step 5", step=5)
HEAD = {"model": "my run", "created": 0, "system_fingerprint": "step-5"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, Any] = {CHAT: {"messages": [{"role": "user", "content": "x"}]}, TEXT: {"prompt": "x"}}


class Told:
    """An engine whose every answer is the same, or that refuses to answer."""

    loaded = SimpleNamespace(step=5, label="step 5, after file 1 (a.jsonl)")

    def __init__(self, *items: str | Outcome | Exception, refuses: Exception | None = None) -> None:
        self.items, self.refuses = items, refuses
        self.replies: list[Reply] = []

    def reply(self, messages: list[Any], *_: Any, **__: Any) -> Reply:
        assert [{"role": "user", "content": "x"}] == messages
        return self._answer()

    def go_on(self, text: str, *_: Any, **__: Any) -> Reply:
        assert "x" == text
        return self._answer()

    def _answer(self) -> Reply:
        if self.refuses is not None:
            raise self.refuses
        self.replies.append(reply := Reply())
        for item in self.items:
            reply.put(item)
        return reply


@dataclass
class Answer:
    """What came back."""

    status: int
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, all but the last as values."""
        return [json.loads(line) if "{" in line else line for line in self.text.replace("data: ", "").split("\n\n")]


def ask(service: Service, path: str, body: Any = None, **headers: str) -> Answer:
    """Make a request of the application itself."""
    given = {"Host": "localhost:8000", **headers}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    scope: dict[str, Any] = {
        "type": "http", "method": "GET" if body is None else "POST", "path": path, "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip

    async def call() -> Answer:
        coming = iter([{"type": "http.request", "body": data, "more_body": False}])
        sent: list[Any] = []

        async def receive() -> Any:
            return next(coming, None) or await asyncio.Event().wait()  # nobody goes away

        async def send(message: Any) -> None:
            sent.append(message)

        try:
            await service.app()(scope, receive, send)
        except RuntimeError:  # what nobody foresaw is answered, and reported to the server
            assert sent
        return Answer(sent[0]["status"], b"".join(message["body"] for message in sent[1:]).decode())

    return asyncio.run(call())


def service(*items: str | Outcome | Exception, refuses: Exception | None = None, key: str | None = None) -> Service:
    """Return the service of a server that only this machine reaches."""
    return Service(cast(Engine, Told(*items, refuses=refuses)), "my run", key, Hosts.of("127.0.0.1"))


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/my run", CHAT, TEXT])
def test_who_is_answered(path: str) -> None:
    """At every address: under this machine's names, to its own pages, with the key; who looks for health has no key."""
    body, is_open = ASKED.get(path), path == "/health"
    bearer = {"Authorization": "Bearer secret"}
    for headers, status in (
        (bearer, 200),
        ({**bearer, "Origin": "http://localhost:3000"}, 200),
        ({**bearer, "Origin": "https://evil.example"}, 200 if is_open else 403),
        ({**bearer, "Origin": "null"}, 200 if is_open else 403),
        ({**bearer, "Origin": ""}, 200 if is_open else 403),
        ({**bearer, "Host": "evil.example"}, 403),
        ({**bearer, "Host": ""}, 403),
        ({}, 200 if is_open else 401),
        ({"Authorization": "Bearer "}, 200 if is_open else 401),
        ({"Authorization": "Bearer secret2"}, 200 if is_open else 401),
    ):
        assert status == ask(service("Hello", OUTCOME, key="secret"), path, body, **headers).status, headers
    wide = Service(cast(Engine, Told("Hello", OUTCOME)), "my run", "secret", hosts=None)
    assert 200 == ask(wide, path, body, **bearer, Host="gpu.lan").status
    assert (200 if is_open else 403) == ask(wide, path, body, **bearer, Origin="http://localhost").status
    assert (200 if is_open else 401) == ask(wide, path, body).status


def test_the_model_is_described() -> None:
    """It is listed with the state that answers; another is not there."""
    (listed,) = ask(service(), "/v1/models").json["data"]
    assert {"object": "model", "owned_by": "onward", "id": "my run", "step": 5} == {
        key: listed[key] for key in ("object", "owned_by", "id", "step")
    }
    assert listed == {**ask(service(), "/v1/models/my run").json, "created": listed["created"]}
    assert 401 == ask(service(key="secret"), "/v1/models/gpt").status  # strangers do not learn its name
    other = ask(service(), "/v1/models/gpt")
    assert (404, "there is no such model; the model here is my run") == (other.status, other.json["error"]["message"])


@pytest.mark.parametrize(("finish", "said"), [("length", "length"), ("stop", "stop"), ("cancelled", "stop")])
def test_whole_answers_have_openai_s_shape(finish: Any, said: str) -> None:
    """Text or message, why it ended, the tokens, and the step that answered."""
    outcome = Outcome("Hello", finish, 7, 2, 0.5, "step 5", 5)
    for path, kind, prefix, own in (
        (CHAT, "chat.completion", "chatcmpl-", {"message": {"role": "assistant", "content": "Hello"}}),
        (TEXT, "text_completion", "cmpl-", {"text": "Hello"}),
    ):
        answer = ask(service("Hel", "lo", outcome), path, ASKED[path]).json
        assert answer.pop("id").startswith(prefix)
        choice = {"index": 0, **own, "logprobs": None, "finish_reason": said}
        assert {**HEAD, "object": kind, "choices": [choice], "usage": USAGE} == {**answer, "created": 0}


@pytest.mark.parametrize("with_usage", [False, True])
def test_streams_have_openai_s_shape(with_usage: bool) -> None:
    """Each piece once; a chat begins with its role; the end says why, and of which step; tokens only if asked for."""
    options = {"stream": True, "stream_options": {"include_usage": with_usage}}
    for path, kind, begin, end, form in (
        (CHAT, "chat.completion.chunk", [{"delta": {"role": "assistant", "content": ""}}], {"delta": {}}, "delta"),
        (TEXT, "text_completion", [], {"text": ""}, "text"),
    ):
        answer = ask(service("Hel", "lo", OUTCOME), path, {**ASKED[path], **options})
        *chunks, done, after = answer.events
        assert ("[DONE]", "", 1) == (done, after, len({chunk.pop("id") for chunk in chunks}))
        pieces = [{form: {"content": text} if path == CHAT else text} for text in ("Hel", "lo")]
        head = {**HEAD, "object": kind}
        expected: list[dict[str, Any]] = [
            {
                **head,
                "system_fingerprint": None,
                "choices": [{"index": 0, **own, "logprobs": None, "finish_reason": None}],
            }
            for own in (*begin, *pieces)
        ]
        expected.append({**head, "choices": [{"index": 0, **end, "logprobs": None, "finish_reason": "length"}]})
        expected += [{**head, "choices": [], "usage": USAGE}] if with_usage else []
        assert expected == [{**chunk, "created": 0} for chunk in chunks]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_answer_that_fails_is_said_to_have(path: str) -> None:
    """What is known of it is told, whole or in a stream; of what nobody foresaw, nothing is."""
    known = {"error": {"message": "memory ran out", "type": "server_error", "param": None, "code": None}}
    whole = ask(service("Hel", ModelError("memory ran out")), path, ASKED[path])
    assert (500, known) == (whole.status, whole.json)
    stream = ask(service("Hel", ModelError("memory ran out")), path, {**ASKED[path], "stream": True})
    assert (200, [known, ""]) == (stream.status, stream.events[-2:])
    for failing in (service(RuntimeError("secret")), service(refuses=RuntimeError("secret"))):
        answer = ask(failing, path, ASKED[path])
        assert (500, "server_error", False) == (answer.status, answer.json["error"]["type"], "secret" in answer.text)
    refused = ask(service(refuses=UsageError("too long", hint="x")), path, ASKED[path])
    blamed = "messages" if path == CHAT else "prompt"
    assert (400, "too long", blamed) == (refused.status, *(refused.json["error"][key] for key in ("message", "param")))


@pytest.mark.parametrize("values", [{}, {"stream": True}])
def test_an_answer_that_was_given_is_over(values: dict[str, Any]) -> None:
    """The engine computes no more of it, whatever is left."""
    one = service("Hel", OUTCOME)
    ask(one, CHAT, {**ASKED[CHAT], **values})
    assert [True] == [reply.is_cancelled for reply in cast(Told, one.engine).replies]


def test_a_request_has_a_largest_size() -> None:
    """One byte more is refused without being read as JSON."""
    fits, large = (ask(service(), CHAT, b" " * size) for size in (LARGEST, LARGEST + 1))
    assert (400, "the request is not JSON") == (fits.status, fits.json["error"]["message"])
    assert (400, f"the request is longer than {LARGEST} bytes") == (large.status, large.json["error"]["message"])
