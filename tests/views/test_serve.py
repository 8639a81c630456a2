"""OpenAI's client talks to a run; a newer commit takes over without a dropped request; strangers are refused."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from addresses import NEEDS_IPV6
from daemons import until
from faults import copy_run
from processes import start_command

from onward import Run
from onward.layout import RunLayout
from onward.views.chat.engine import Engine, Outcome, Reply
from onward.views.chat.sampling import Sampling
from onward.views.loaded import Loaded, load
from onward.views.points import hold, state_mark

uvicorn = pytest.importorskip("uvicorn", reason="onward[serve] is not installed")
pytest.importorskip("starlette", reason="onward[serve] is not installed")
from onward.views.serve.app import Service  # noqa: E402
from onward.views.serve.server import Following, hosts_of  # noqa: E402
from onward.views.web.listening import listen, url_of  # noqa: E402

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
QUESTION: list[Any] = [{"role": "user", "content": "what runs past the river?"}]


def calling(calls: Any) -> dict[str, Any]:
    """Return a message of an assistant that calls tools, as a client sends it back."""
    return {"role": "assistant", "content": None, "tool_calls": calls}


@contextmanager
def served(engine: Engine, key: str | None = None, host: str = "127.0.0.1", name: str = "run") -> Iterator[str]:
    """Yield the base URL of a server over an engine."""
    listening = listen(host, 0)
    service = Service(engine, name, key, hosts_of(host, listening))
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"{url_of(host, listening)}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def engine(stream: Path) -> Iterator[Engine]:
    """An engine on the newest commit."""
    layout = RunLayout(stream)
    with hold(layout) as point:
        loaded = load(layout, point)
    with Engine(loaded) as opened:
        yield opened


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    """The base URL of a server that lives as long as this module's tests."""
    with served(engine) as address:
        yield address


@pytest.mark.parametrize("name", ["my\nrun", "run\n", "a/b", "..", "x?y#z%0A", "zwölf\u2028"])
def test_a_model_of_any_name_has_an_address(engine: Engine, name: str) -> None:
    """The name comes from a folder and may hold any character; quoted, it is an address."""
    with (
        served(engine, name=name) as address,
        urllib.request.urlopen(f"{address}/models/{urllib.parse.quote(name, safe='')}") as answer,
    ):
        assert name == json.load(answer)["id"]


def ask(url: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Send a request as it is; returns status and JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text.decode()


def test_openai_s_client(url: str, engine: Engine) -> None:
    """Chats and texts, whole and as streams, give what the engine gives; the model is listed."""
    openai = pytest.importorskip("openai", reason="the client is not installed")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    expected = engine.reply(QUESTION, Sampling(0.0, max_tokens=8)).outcome
    (listed,) = client.models.list().data
    whole = client.chat.completions.create(model=listed.id, messages=QUESTION, **GREEDY)
    assert expected.text == whole.choices[0].message.content
    assert ("length", "step-5", "run") == (whole.choices[0].finish_reason, whole.system_fingerprint, whole.model)
    assert (expected.prompt_tokens, 8) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="run", messages=QUESTION, **GREEDY, **options))
    assert expected.text == "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.usage == chunks[-1].usage
    text = client.completions.create(model="run", prompt="the river", **GREEDY)
    pieces = client.completions.create(model="run", prompt="the river", **GREEDY, stream=True)
    assert text.choices[0].text == "".join(piece.choices[0].text for piece in pieces)
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.chat.completions.create(model="run", messages=QUESTION, n=2)


def test_answers_by_plain_http(url: str, engine: Engine) -> None:
    """A seed gives the same answer again; `stop` ends it, and a text that goes on; contents may come in parts."""
    body = {"messages": QUESTION, "temperature": 2, "max_tokens": 20, "seed": 7}
    first, again = (ask(f"{url}/chat/completions", body)[1]["choices"][0]["message"]["content"] for _ in range(2))
    assert first == again == engine.reply(QUESTION, Sampling(2.0, 1.0, max_tokens=20, seed=7)).outcome.text
    cut = ask(f"{url}/chat/completions", {**body, "stop": [first[5:7]]})[1]["choices"][0]
    assert (first[: first.index(first[5:7])], "stop") == (cut["message"]["content"], cut["finish_reason"])
    text = {**body, "prompt": "the river", "messages": None}
    goes_on = ask(f"{url}/completions", text)[1]["choices"][0]["text"]
    ended = ask(f"{url}/completions", {**text, "stop": goes_on[5:7]})[1]["choices"][0]
    assert (goes_on[: goes_on.index(goes_on[5:7])], "stop") == (ended["text"], ended["finish_reason"])
    unrelated = {
        "user": "u",
        "metadata": {"a": "b"},
        "n": 1,
        "presence_penalty": 0,
        "logit_bias": {},
        "top_logprobs": None,
    }
    assert first == ask(f"{url}/chat/completions", {**body, **unrelated})[1]["choices"][0]["message"]["content"]
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert first == ask(f"{url}/chat/completions", {**body, "messages": parts})[1]["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "not a JSON object"),
        ({}, "messages must be a list"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "something other than text"),
        ({"messages": QUESTION, "temperature": "hot"}, "temperature must be a number"),
        ({"messages": QUESTION, "temperature": -1}, "temperature cannot be -1.0"),
        ({"messages": QUESTION, "max_tokens": 0}, "max_tokens cannot be 0"),
        ({"messages": QUESTION, "logprobs": True}, "logprobs is not supported"),
        ({"messages": QUESTION, "stop": 5}, "stop must be"),
        ({"messages": QUESTION, "min_p": 0.1}, "min_p is not known here"),
        ({"messages": QUESTION, "\ud800": 1}, "\\ud800 is not known here"),
        ({"messages": QUESTION, "tools": [{"function": {"name": "f"}}]}, "does not write the tools"),
        ({"messages": QUESTION, "tools": ["f"]}, "tools must be objects"),
        ({"messages": [*QUESTION, calling([{"name": "f"}])]}, "does not write the tool call of message 2"),
        ({"messages": [*QUESTION, calling([{"name": "f", "arguments": "{"}])]}, "cannot be read as JSON"),
        ({"messages": [*QUESTION, calling(3)]}, '"tool_calls" of messages[1] is a number'),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "control token"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "the model takes only 1024"),
        (b" " * (64 << 20), "longer than"),
    ],
)
def test_bad_requests_are_told(url: str, body: Any, words: str) -> None:
    """With status 400 and what is wrong; the server goes on."""
    status, answer = ask(f"{url}/chat/completions", body)
    assert 400 == status
    assert words in answer["error"]["message"]


def test_strangers_are_refused(url: str, engine: Engine) -> None:
    """A page of another site, another name for this machine, and clients without the key."""
    body = {"messages": QUESTION, **GREEDY}
    path, health = f"{url}/chat/completions", f"{url.removesuffix('/v1')}/health"
    assert 403 == ask(path, body, Origin="https://evil.example")[0]
    assert [403, 403] == [ask(place, given, Host="evil.example")[0] for place, given in ((path, body), (health, None))]
    assert 200 == ask(health, None)[0]
    assert 200 == ask(path, body, Origin="http://localhost:3000")[0]
    with served(engine, key="secret") as locked:
        statuses = [
            ask(f"{locked}/chat/completions", body, Authorization=given)[0]
            for given in ("Bearer x", "secret", "Bearer secret", "bearer secret")
        ]
        assert [401, 401, 200, 200] == statuses
        assert 401 == ask(f"{locked}/chat/completions", b" " * (64 << 20))[0]


def test_a_client_that_goes_away_ends_its_answer(url: str, engine: Engine) -> None:
    """The answer of a stream that nobody reads ends, so that the next request does not wait for it."""
    body = {"messages": QUESTION, "temperature": 3, "max_tokens": 900, "stream": True, "seed": 1}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        answer.readline()
    assert 200 == ask(f"{url}/chat/completions", {"messages": QUESTION, **GREEDY})[0]


class Recorded(Engine):
    """An engine that remembers what came of its answers."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def keep_busy(self) -> threading.Event:
        """Let all answers wait for the event that is returned, as behind a long one."""
        over = threading.Event()
        self._thread.submit(over.wait)
        return over

    def reply(self, *arguments: Any, **named: Any) -> Reply:
        reply = super().reply(*arguments, **named)
        self.replies.put(reply)
        put = reply.put

        def recorded(item: Any) -> None:
            put(item)
            if isinstance(item, Outcome):
                self.outcomes.put(item)

        reply.put = recorded  # type: ignore[method-assign]
        return reply


def test_a_client_that_goes_away_ends_its_whole_answer(stream: Path) -> None:
    """Also one that is not streamed, as of a client whose patience ended and which asks again."""
    layout = RunLayout(stream)
    with hold(layout) as point, Recorded(load(layout, point)) as engine, served(engine) as url:
        body = json.dumps({"messages": QUESTION, "temperature": 0, "max_tokens": 900}).encode()
        with pytest.raises(TimeoutError), urllib.request.urlopen(f"{url}/chat/completions", body, timeout=0.2):
            pass
        assert "cancelled" == engine.outcomes.get(timeout=60).finish


def test_a_client_that_goes_away_before_its_turn_is_not_answered(stream: Path) -> None:
    """Whoever leaves while others are answered takes no time of those behind, whether it asked for a stream or not."""
    layout = RunLayout(stream)
    with hold(layout) as point, Recorded(load(layout, point)) as engine, served(engine) as url:
        others_are_answered = engine.keep_busy()
        body = json.dumps({"messages": QUESTION, "temperature": 0, "max_tokens": 900, "stream": True}).encode()
        with urllib.request.urlopen(f"{url}/chat/completions", body) as answer:
            answer.readline()
        reply = engine.replies.get()
        until(lambda: reply.is_cancelled)
        others_are_answered.set()
        outcome = engine.outcomes.get(timeout=60)
    assert ("cancelled", 0) == (outcome.finish, outcome.tokens)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/embeddings", 404), ("GET", "/chat/completions", 405)]
)
def test_what_is_not_answered_is_told_as_openai_tells_it(url: str, method: str, path: str, status: int) -> None:
    """An address that there is not, or a wrong method: an error that its client shows."""
    request = urllib.request.Request(f"{url}{path}", b"{}" if method == "POST" else None, method=method)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    error = json.loads(refused.value.read())["error"]
    assert (status, "invalid_request_error") == (refused.value.code, error["type"])
    assert f"{method} /v1{path}" in error["message"]


def test_a_server_that_only_this_machine_reaches_knows_its_names_whatever_it_is_called() -> None:
    """A name of this machine's loopback keeps other names out as its address does; one that others reach has a key."""
    with listen("127.0.0.1", 0) as local, listen("0.0.0.0", 0) as wide:
        hosts = hosts_of("my-laptop", local)
        assert hosts is not None
        assert [True, True, False] == [hosts.know(host) for host in ("my-laptop:80", "localhost", "evil.example")]
        assert hosts_of("0.0.0.0", wide) is None


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", pytest.param("::1", marks=NEEDS_IPV6)])
def test_a_server_goes_by_the_name_that_it_listens_at(engine: Engine, host: str) -> None:
    """Every address of this machine's loopback is one that it can be asked at."""
    with served(engine, host=host) as url:
        assert "run" == ask(f"{url}/models", None)[1]["data"][0]["id"]


def test_a_newer_commit_takes_over_without_a_dropped_request(stream: Path, tmp_path: Path) -> None:
    """Requests come all the while a file is trained: each is answered, by the step before or by the one after."""
    layout = RunLayout(copy_run(stream, tmp_path / "run"))
    rows = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.chat_rows(2, seed=3))
    with hold(layout) as point:
        loaded = load(layout, point)
    said: list[str] = []
    with Engine(loaded) as engine, served(engine) as url, ThreadPoolExecutor(4) as threads:
        following = Following(layout, engine, state_mark(layout), said.append, lambda: None)
        body = {"messages": QUESTION, **GREEDY}
        early = [threads.submit(ask, f"{url}/chat/completions", body) for _ in range(8)]
        Run(layout.root).train(rows)
        moving = threads.submit(following.look)
        late = [threads.submit(ask, f"{url}/chat/completions", body) for _ in range(8)]
        moving.result()
        answers = [task.result() for task in (*early, *late)]
        after = ask(f"{url}/chat/completions", body)[1]
        following.look()  # nothing new: nothing happens
    assert {200} == {status for status, _ in answers}
    assert {"step-5", "step-6"} >= {answer["system_fingerprint"] for _, answer in answers}
    assert "step-6" == after["system_fingerprint"]
    assert ["step 6, after file 4 (d.jsonl) answers"] == said


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_command(name: str, stream: Path, tmp_path: Path) -> None:
    """The base URL is the first line on stdout; the process ends on a signal, with status 0 and without a word."""
    output = tmp_path / "out"
    output.touch()
    process = start_command(output, "serve", "--port", 0, "--run", stream, "--at", "b.jsonl")
    while not (lines := [line for line in output.read_text().splitlines(True) if line.startswith("http")]):
        process.join(0.05)
        assert process.is_alive(), output.read_text()
    url = lines[0].strip()
    assert url.endswith("/v1")
    assert "step-3" == ask(f"{url}/chat/completions", {"messages": QUESTION, **GREEDY})[1]["system_fingerprint"]
    assert process.pid is not None
    os.kill(process.pid, signal.Signals[name])
    process.join()
    assert 0 == process.exitcode
    assert [] == [word for word in ("Traceback", "interrupted", "ended by") if word in output.read_text()]
