"""Deterministic kernels, for as long as they are needed; what is recorded of a machine, and what of it is compared."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from onward import startup
from onward.errors import ConfigError, ModelError
from onward.training.admission.findings import Findings
from onward.training.device.environment import (
    LATER_FACTS,
    NUMERICS,
    SETTINGS,
    autocast,
    describe_environment,
    deterministic,
    differences,
    pick_device,
    pick_dtype,
    promises_bits,
    require_whole_teams,
    same_environment,
    settings_of,
    without_tf32,
)
from onward.training.device.hardware import (
    UNKNOWN,
    cublas_version,
    driver_version,
    multiplies_bfloat16,
    processor_model,
    tf32,
)
from onward.training.seeds import seeded

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BASE = {"device": "cpu", "threads": 2, "dtype": "float32"}


def flags() -> tuple[bool, bool, bool]:
    """Return whether deterministic algorithms are on, whether they only warn, and whether memory is filled."""
    memory: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("computing", [lambda: seeded(7, CPU), lambda: deterministic(GPU)], ids=["seeded", "strict"])
def test_threads_take_turns(computing: Callable[[], AbstractContextManager[None]]) -> None:
    """The generators and the setting are the whole process's; a thread that holds them may ask again."""
    entered, seen = threading.Event(), list[bool]()

    def compute() -> None:
        with computing():
            entered.set()

    other = threading.Thread(target=compute)
    with computing(), computing():
        other.start()
        seen.append(entered.wait(0.05))
    other.join(60)
    assert [False, True] == [*seen, entered.is_set()]


@pytest.mark.parametrize("own", [(False, False), (True, False), (True, True)])
def test_deterministic_kernels_end_with_the_body(own: tuple[bool, bool]) -> None:
    """On a GPU they are on within, strictly, and put back as they were, after an error too; else nothing is set."""
    before = flags()
    try:
        torch.use_deterministic_algorithms(own[0], warn_only=own[1])
        for plainly in (deterministic(CPU), deterministic(GPU, exact=False)):
            with plainly:
                assert (*own, True) == flags()
        with contextlib.suppress(ValueError), deterministic(GPU):
            assert (True, False, False) == flags()
            raise ValueError
        assert (*own, True) == flags()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let PyTorch compute with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_of_a_cpu_add_in_one_order() -> None:
    """The gradient of rows that are taken several times, as by the experts of a token, has the same bits every time."""
    source = torch.Generator().manual_seed(0)
    places, values = torch.randint(0, 50, (4096,), generator=source), torch.randn(4096, 64, generator=source)
    table = torch.randn(50, 64, generator=source, requires_grad=True)
    found: set[bytes] = set()
    for _ in range(50):
        with deterministic(CPU):
            (gradient,) = torch.autograd.grad((table[places] * values).sum(), table)
        found.add(gradient.numpy().tobytes())
    assert 1 == len(found)


@pytest.mark.usefixtures("two_threads")
def test_the_setting_stays_while_another_thread_needs_it() -> None:
    """Training and the measurement of a copy hold it at the same time; whoever leaves first does not end it."""
    before, left = flags(), threading.Event()
    entered: list[threading.Event] = [threading.Event(), threading.Event()]
    seen: list[tuple[bool, bool, bool]] = []

    def first() -> None:
        with deterministic(CPU):
            entered[0].set()
            entered[1].wait(60)
        left.set()

    other = threading.Thread(target=first)
    other.start()
    entered[0].wait(60)
    with deterministic(CPU):
        entered[1].set()
        left.wait(60)
        seen.append(flags())
    other.join(60)
    assert [(True, False, False)] == seen
    assert before == flags()


def test_what_does_not_repeat_is_refused_by_name() -> None:
    """An operation without a deterministic form is named, with the key that allows it: PyTorch's own error, really."""
    with pytest.raises(ModelError, match="the model uses put_") as refused, deterministic(GPU):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert "deterministic" == refused.value.where
    assert "deterministic: false" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (
            "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
            "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
            "CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an "
            "environment variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8",
            ModelError,
        ),
        ("CUDA error: device-side assert triggered", RuntimeError),
    ],
    ids=["cuBLAS", "another"],
)
def test_other_errors_stay_what_they_are(message: str, kind: type[Exception]) -> None:
    """The error of cuBLAS without its setting says how to set it; unrelated errors pass through."""
    with pytest.raises(kind) as raised, deterministic(GPU):
        raise RuntimeError(message)
    assert type(raised.value) is kind
    assert kind is RuntimeError or "CUBLAS_WORKSPACE_CONFIG=:4096:8" in str(raised.value.hint)  # type: ignore[attr-defined]


def test_earlier_records_compare_as_before() -> None:
    """A fact that one of two records lacks says nothing; one that both have must be equal."""
    here = describe_environment(CPU, torch.float32)
    before = {key: value for key, value in here.items() if key not in LATER_FACTS}
    assert processor_model() == here["processor_model"]
    assert same_environment(before, here)
    assert same_environment(here, before)
    assert not same_environment(here, {**here, "processor_model": "another"})
    assert not same_environment({**before, "threads": 99}, here)
    assert not same_environment({**here, "deterministic": False}, here)
    assert not same_environment(before, {**here, "something": "new"})
    there = {**before, "threads": 99, "processor_model": "another"}
    assert "" == differences(before, here)
    assert f"processor_model another (here {processor_model()}), threads 99 (here 1)" == differences(there, here)


def test_a_record_has_what_the_bits_depend_on() -> None:
    """All of it is in the record of an environment, and nothing else."""
    expected = {
        "device": "cpu", "processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
        "machine": platform.machine(), "processor_model": processor_model(), "settings": settings_of(os.environ),
    }  # fmt: skip
    plain = {**expected, "dtype": "float32", "numerics": NUMERICS}
    assert plain == describe_environment(CPU, torch.float32)
    facts = {"layers": {"attention": "varlen"}, "ranks": {"exchange": "fast"}}
    other = {"dtype": "bfloat16", "numerics": 7, "attention": "varlen", "deterministic": False, "exchange": "fast"}
    assert {**expected, **other} == describe_environment(CPU, torch.bfloat16, 7, exact=False, **facts)
    assert [False] * 3 == [
        same_environment(plain, {**plain, key: "other"}) for key in ("numerics", "processor", "transformers")
    ]


def test_variables_that_choose_how_products_are_computed_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line itself sets is none of them, nor is one that is empty."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    variables = dict[str, str]()
    startup.set_environment(variables)
    assert "none" == settings_of(variables)
    before = describe_environment(CPU, torch.float32)["settings"]
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    here = describe_environment(CPU, torch.float32)["settings"]
    assert "none" == before
    assert "MKL_CBWR=COMPATIBLE" == here
    assert "settings none (here MKL_CBWR=COMPATIBLE)" == differences({"settings": before}, {"settings": here})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert "MKL_CBWR=COMPATIBLE, CUBLAS_WORKSPACE_CONFIG=:16:8" == settings_of(os.environ)


def test_a_forward_pass_runs_in_the_compute_type() -> None:
    """Under autocast where it is a half type; as the weights are in float32."""
    for dtype, expected in ((torch.float32, None), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        with autocast(CPU, dtype):
            assert (expected is not None) == torch.is_autocast_enabled("cpu")
            assert expected in (None, torch.get_autocast_dtype("cpu"))


def test_where_bits_are_promised() -> None:
    """Not where determinism is off, nor on Apple's GPUs; the record says that it is off, and only then says a thing."""
    assert promises_bits(describe_environment(CPU, torch.float32))
    assert "deterministic" not in describe_environment(CPU, torch.float32)
    assert not promises_bits(describe_environment(CPU, torch.float32, exact=False))
    assert not promises_bits({**BASE, "device": "mps"})
    assert "varlen" == describe_environment(CPU, torch.float32, layers={"attention": "varlen"})["attention"]


@pytest.mark.parametrize(
    ("capability", "is_amd", "fits"), [((7, 0), False, False), ((7, 5), False, False), ((8, 0), False, True),
    ((9, 0), False, True), ((12, 0), False, True), ((7, 5), True, True)],
)  # fmt: skip
def test_bfloat16_needs_units_for_it(capability: tuple[int, int], is_amd: bool, fits: bool) -> None:
    """V100 and T4 only emulate it, so `auto` trains in float32 there."""
    assert fits == multiplies_bfloat16(capability, is_amd=is_amd)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"device": "cuda", "capability": "7.5", "bfloat16": False, "dtype": "float32"}, ["7.5", "in float32"]),
        ({"device": "cuda", "capability": "7.0", "bfloat16": False, "dtype": "bfloat16"}, ["emulates bfloat16"]),
        ({"device": "mps", "dtype": "float32"}, ["`close` at most"]),
        ({**BASE, "deterministic": False}, ["`not deterministic`"]),
        ({"device": "cuda", "capability": "9.0", "bfloat16": True, "dtype": "bfloat16"}, []),
        (BASE, []),
    ],
)
def test_a_person_is_told_what_a_machine_does_not_have(environment: dict[str, Any], words: list[str]) -> None:
    """`init` and `doctor` say in a line which type is computed in and why, and where no bits are promised."""
    found = Findings("end to end", "", 0.0, 1, 1.0, (), (), {}, (), environment, 0.0)
    text = "\n".join(found.lines()[1:])
    assert [True] * len(words) == [word in text for word in words]
    assert words or not text


def test_types_that_are_picked_without_nvidia() -> None:
    """`auto` is float32 on a CPU and on Apple's GPUs; a type that is named is taken."""
    assert [torch.float32] * 2 == [pick_dtype("auto", torch.device(kind)) for kind in ("cpu", "mps")]
    assert torch.bfloat16 == pick_dtype("bfloat16", CPU)
    assert ["mps", "cpu"] == [pick_device(has_cuda=False, has_mps=there).type for there in (True, False)]


def test_names_are_read_where_the_system_says_them(tmp_path: Path) -> None:
    """The processor's name and the driver's version are those of the system's files; what is missing is unknown."""
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: A Processor, 64 cores\nmodel name\t: A Processor, 64 cores\n")
    assert "A Processor, 64 cores" == processor_model(listing)
    listing.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nCPU part\t: 0xd0c\nCPU revision\t: 1\n")
    assert "0xd0c" == processor_model(listing)
    assert processor_model(tmp_path / "nowhere")
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:\n"
    )
    assert "580.65.06" == driver_version(driver)
    assert UNKNOWN == driver_version(tmp_path / "nowhere")
    assert UNKNOWN == cublas_version(None) == cublas_version("0.0")


def test_settings_of_tf32_are_read_however_they_were_made() -> None:
    """PyTorch has two ways to set it and refuses to read one after the other was used."""

    class Newer:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("mix of the legacy and new APIs")

    owners = {"matmul": SimpleNamespace(allow_tf32=False), "cudnn": Newer()}
    assert "matmul off, cudnn tf32" == tf32(owners)
    assert {"matmul", "cudnn"} == {each.split()[0] for each in tf32().split(", ")}


@pytest.mark.parametrize("name", ["allow_tf32", "fp32_precision"])
def test_products_are_not_rounded_to_tf32_while_that_is_asked_for(name: str) -> None:
    """In whichever way the user set it, it is as before afterwards, also after an error; on a CPU nothing is set."""
    rounds, exact = {"allow_tf32": (True, False), "fp32_precision": ("tf32", "ieee")}[name]
    owners = SimpleNamespace(**{name: rounds}), SimpleNamespace(**{name: exact})
    with contextlib.suppress(KeyError), without_tf32(torch.device("cuda"), owners):
        assert [exact, exact] == [getattr(owner, name) for owner in owners]
        raise KeyError
    with without_tf32(torch.device("cpu"), owners):
        assert [rounds, exact] == [getattr(owner, name) for owner in owners]


@pytest.mark.parametrize(("setting", "value"), [("dynamic", 1), ("max_active_levels", 0)])
def test_threads_that_may_not_come_are_refused(setting: str, value: int) -> None:
    """Where OpenMP may give a product fewer threads than PyTorch counts on, oneDNN leaves out parts of it and reports
    nothing; a single thread always comes.
    """
    openmp = ctypes.CDLL(None)
    if not hasattr(openmp, "omp_set_dynamic"):
        pytest.skip("this release of PyTorch has no OpenMP")
    before, threads = getattr(openmp, f"omp_get_{setting}")(), torch.get_num_threads()
    cpu = torch.device("cpu")
    try:
        torch.set_num_threads(2)
        require_whole_teams(cpu)
        getattr(openmp, f"omp_set_{setting}")(value)
        with pytest.raises(ConfigError, match="products would be wrong") as refused:
            require_whole_teams(cpu)
        assert f"OMP_{setting.upper()}" == refused.value.where
        torch.set_num_threads(1)
        require_whole_teams(cpu)
    finally:
        getattr(openmp, f"omp_set_{setting}")(before)
        torch.set_num_threads(threads)
