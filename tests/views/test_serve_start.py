"""How `onward serve` is started: the commands that the documentation names, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import assert_refused, onward
from documented import DOCS, blocks_for, prepare

pytest.importorskip("uvicorn", reason="onward[serve] is not installed")
pytest.importorskip("starlette", reason="onward[serve] is not installed")
from onward.views.web.listening import listen


def test_the_commands_of_the_documentation_run(
    stream: Path, program: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's client asks a run as docs/serve.md says."""
    pytest.importorskip("openai", reason="the client is not installed")
    prepare(program, model, tmp_path, monkeypatch)
    (tmp_path / "my-run").symlink_to(stream)
    (block,) = blocks_for("test_serve_start", DOCS / "serve.md")
    block.run()


def test_what_cannot_be_served_is_refused(stream: Path) -> None:
    """A port that is taken, other machines without a key, two states at once."""
    taken = listen("127.0.0.1", 0)
    with taken:
        port = taken.getsockname()[1]
        assert_refused(onward("serve", "--port", port, "--run", stream), 2, "cannot listen there", "--port 0")
    assert_refused(onward("serve", "--host", "0.0.0.0", "--run", stream), 2, "ONWARD_API_KEY")
    assert_refused(onward("serve", "--at", "1", "--follow", "--run", stream), 2, "Leave one out")


@pytest.mark.parametrize("key", ["secret\n", " secret", "schlüssel", "\udcff"])
def test_a_key_that_no_client_could_send_is_refused(key: str, stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line end that came along with a secret would shut out every client; the variable is named."""
    monkeypatch.setenv("ONWARD_API_KEY", key)
    assert_refused(onward("serve", "--port", 0, "--run", stream), 2, "ONWARD_API_KEY", "openssl rand")
