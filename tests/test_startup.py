"""The start of a process: what the command line sets for its own, and that the library sets nothing for its host."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from commands import make_run
from processes import apart

from onward import startup
from onward.layout import RunLayout
from onward.store.ledger import Ledger, make_ledger
from onward.text import without_module

IMPORTS = """
import gc, sys
from onward.startup import large_imports
{before}
with large_imports():
    inside = gc.isenabled()
    import {library}
print(inside, gc.isenabled(), gc.get_freeze_count() > 10_000)
"""

SETTINGS = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "GOMP_SPINCOUNT": "1000",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""What the command line puts into its environment where the user has set nothing."""

COMMAND_LINE = """
import atexit, gc, json, os, sys
from onward.cli import main

def say():
    print(json.dumps([dict(os.environ), gc.get_freeze_count(), gc.isenabled()]))

atexit.register(say)
sys.argv = ["onward", *{arguments!r}]
main()
"""

HOST = """
import gc, json, logging, os, random, signal, sys, threading, warnings
{imports}

def state():
    found = {{
        "environment": dict(os.environ),
        "collector": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.get_debug()],
        "signals": [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "random": repr(random.getstate()),
        "finders": [repr(finder) for finder in sys.meta_path if "onward" in repr(finder)],
        "threads": [thread.name for thread in threading.enumerate()],
        "mask": repr(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }}
    if "torch" in sys.modules:
        import numpy, torch, transformers
        from huggingface_hub.utils import are_progress_bars_disabled
        from transformers.utils import import_utils
        from transformers.utils import logging as transformers_logging
        found |= {{
            "warnings": [repr(each) for each in warnings.filters],
            "verbosity": transformers_logging.get_verbosity(),
            "peft": logging.getLogger("peft").level,
            "bars": [transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()],
            "deterministic": [
                torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()],
            "threads of torch": [torch.get_num_threads(), torch.get_num_interop_threads()],
            "dtype": repr(torch.get_default_dtype()),
            "gradients": torch.is_grad_enabled(),
            "numpy": repr(numpy.random.get_state()),
            "torch": torch.random.get_rng_state().tolist(),
            "scanner": import_utils.create_import_structure_from_path.__module__,
            "cache": import_utils.create_import_structure_from_path.cache_info().maxsize,
        }}
    return found

before = state()
import onward
run = onward.Run.create({run!r}, {model!r}, batch_size=4, max_length=256)
run.train({file!r})
run.verify(deep=True)
after = state()
print(json.dumps({{key: [before[key], after[key]] for key in before if before[key] != after[key]}}))
print(run.status()["global_step"])
"""

OWN_SETTINGS = """
import numpy, torch, peft, transformers
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_info()
logging.getLogger("peft").setLevel(logging.DEBUG)
warnings.simplefilter("error", FutureWarning)
gc.unfreeze(); gc.disable(); gc.set_threshold(900, 9, 9)
torch.use_deterministic_algorithms(True)
"""
"""What a host program may have set before it uses the library."""


def printed(script: str, **environment: str) -> list[str]:
    """Run a script in a process of its own, without the settings; returns the lines that it printed."""
    names = {*SETTINGS, "OMP_WAIT_POLICY"}
    variables = {name: value for name, value in os.environ.items() if name not in names} | environment
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()


def host(script: str, output: str) -> None:
    """Run a script in this process, which has all libraries; what it prints goes to a file."""
    with Path(output).open("w") as stream, contextlib.redirect_stdout(stream):
        exec(compile(script, "host", "exec"), {"__name__": "host"})


def test_large_imports_rest_the_collector_and_put_their_objects_out_of_its_way() -> None:
    """Within, the collector is off; afterwards it is on again and passes over what was imported."""
    assert ["False True True"] == printed(IMPORTS.format(before="", library="torch"))


@pytest.mark.parametrize(("level", "error"), [("1", "ValueError"), ("2", "UsageError")])
def test_docstrings_that_were_left_out_are_named(level: str, error: str) -> None:
    """transformers makes the docstrings of its models out of others, and fails where Python has removed them."""
    said = "import os; sys.excepthook = lambda kind, *_: os._exit(print(kind.__name__, flush=True) or 0)"
    assert [error] == printed(IMPORTS.format(before=said, library="gc; int('x')"), PYTHONOPTIMIZE=level)


def test_a_process_that_has_torch_is_left_as_it_is() -> None:
    """Where torch is imported already, large garbage may wait: the collector stays on."""
    assert ["True True False"] == printed(IMPORTS.format(before="sys.modules['torch'] = sys", library="torch"))


def test_a_collector_that_the_user_switched_off_stays_off() -> None:
    """The user's setting wins."""
    assert ["False False False"] == printed(IMPORTS.format(before="gc.disable()", library="json"))


def test_variables_of_the_user_win() -> None:
    """What is set already stays; a wait policy of the user's replaces ours."""
    empty: dict[str, str] = {}
    startup.set_environment(empty)
    assert SETTINGS == empty
    own = dict.fromkeys(SETTINGS, "7")
    startup.set_environment(own)
    assert dict.fromkeys(SETTINGS, "7") == own
    waiting = {"OMP_WAIT_POLICY": "active"}
    startup.set_environment(waiting)
    assert waiting.keys() == {*SETTINGS, "OMP_WAIT_POLICY"} - {"GOMP_SPINCOUNT"}
    earlier = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    startup.set_environment(earlier)
    assert earlier.keys() == {*SETTINGS, "PYTORCH_CUDA_ALLOC_CONF"} - {"PYTORCH_ALLOC_CONF"}


FETCHES = """
import importlib.util, sys
sys.argv = ["onward", "releases", "--run", "nowhere"]
from onward.cli.entry import status_of_command
print(status_of_command(), importlib.util.find_spec("kernels"))
"""


def test_no_library_finds_the_package_that_fetches_code(tmp_path: Path) -> None:
    """In a process of the command line, `kernels` cannot be imported, though it is installed: libraries that find it
    download compiled code from a hub and run it."""
    (tmp_path / "kernels.py").touch()
    seen = printed(FETCHES, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(startup.__file__).parents[1])]))
    assert ["2 None"] == seen


@pytest.mark.slow
def test_the_command_line_sets_up_its_own_process(model: Path, tmp_path: Path) -> None:
    """A command that trains has its settings in force, and what it imported is hidden from the collector."""
    run = make_run(tmp_path / "run", model)
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(4))
    last = printed(COMMAND_LINE.format(arguments=["train", str(file), "--run", str(run)]), LRU_CACHE_CAPACITY="9")[-1]
    environment, frozen, enabled = json.loads(last)
    assert SETTINGS | {"LRU_CACHE_CAPACITY": "9"} == {name: environment.get(name) for name in SETTINGS}
    assert frozen > 10_000
    assert enabled


@pytest.mark.parametrize(
    "has_settings",
    [pytest.param(False, id="before torch", marks=pytest.mark.slow), pytest.param(True, id="with settings of its own")],
)
def test_the_library_leaves_a_host_program_as_it_is(has_settings: bool, model: Path, tmp_path: Path) -> None:
    """Whoever imports Onward, trains and verifies has the same process afterwards: no setting of it has changed."""
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(4))
    script = HOST.format(
        imports=OWN_SETTINGS if has_settings else "", run=str(tmp_path / "run"), model=str(model), file=str(file)
    )
    if has_settings:
        assert 0 == apart(host, script, str(tmp_path / "output"))
        changed, step = (tmp_path / "output").read_text().splitlines()[-2:]
    else:
        changed, step = printed(script)[-2:]
    assert {} == json.loads(changed)
    assert "1" == step


LIGHT = """
import sys
from onward import Run
run = Run(sys.argv[1])
print(run.skip("a.jsonl"), run.pause(), run.resume(), run.stop(), [entry["state"] for entry in run.history()], sep="|")
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_what_needs_no_model_loads_no_torch(tmp_path: Path) -> None:
    """A waiting file is taken out, and a run paused, stopped and looked at, without the seconds that torch takes."""
    layout = RunLayout(tmp_path)
    layout.make()
    make_ledger(layout.ledger)
    with Ledger(layout.ledger) as ledger:
        ledger.insert_file(
            command="c", name="a.jsonl", sha256="0" * 64, bytes=1, format="jsonl", copy="archive/a", state="queued",
            again=0, priority=0, rows=1, tokens=1, target_tokens=1, truncated=0, dropped=0,
        )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LIGHT, str(tmp_path)], capture_output=True, text=True, check=True)
    answers, loaded = done.stdout.splitlines()
    assert [
        "skipped a.jsonl",
        "no process owns this run; the next onward watch begins paused",
        "no longer paused; onward watch continues the run",
        "no process owns this run",
        "['skipped']",
    ] == answers.split("|")
    assert "[]" == loaded


FINALIZED = """
import signal, time
from onward.startup import kept_interrupts

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell started in the background
with kept_interrupts():
    try:
        Finalized()
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_an_interrupt_is_not_lost_in_a_finalizer() -> None:
    """Python prints a Ctrl-C that comes while an object is finalized, and goes on; the command line ends."""
    done = subprocess.run([sys.executable, "-c", FINALIZED], capture_output=True, text=True, check=False, timeout=300)
    assert ("interrupted\n", "") == (done.stdout, done.stderr)


INTERRUPTED = """
import os, signal, sys

class AtTyper:
    def find_spec(self, name, *_):
        if name == "typer":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{name})

signal.signal(signal.{name}, signal.default_int_handler if {name!r} == "SIGINT" else signal.SIG_DFL)
sys.meta_path.insert(0, AtTyper())
from onward.cli import main
"""


@pytest.mark.parametrize(("name", "by"), [("SIGINT", "interrupted"), ("SIGTERM", "ended by SIGTERM")])
def test_a_signal_while_the_command_line_is_imported(name: str, by: str) -> None:
    """It ends the command as any later one does: with a line and status 1, no traceback."""
    command = [sys.executable, "-c", INTERRUPTED.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (1, f"{by}; what was committed is safe\n") == (done.returncode, done.stderr)


def test_a_library_that_counts_what_is_left_is_recognised() -> None:
    """Its types have a metaclass of nanobind's, and its objects are freed at the end, so that none is complained of."""
    bound = type("nb_type_0", (type,), {"__module__": "nanobind"})
    assert bound in type.__subclasses__(type)
    assert startup.counts_what_is_left()


def test_a_python_that_was_built_without_a_library_is_named() -> None:
    """Builds from source lack what had no headers: one line, and what to do. What pip installs is another matter."""
    seen = "[sys.modules.pop(name) for name in [*sys.modules] if name.startswith('sqlite3')]"  # coverage imports it
    code = f"import sys; {seen}; sys.modules['_sqlite3'] = None; import onward.cli"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    what, hint = done.stderr.splitlines()
    assert (1, f"onward: this Python lacks its module sqlite3 [{sys.executable}]") == (done.returncode, what)
    assert "install that library with its headers" in hint
    assert without_module(ModuleNotFoundError("No module named 'torch'", name="torch")) is None
