"""What the kernel grants to a machine, a container, a job of Slurm, a unit of systemd: main memory, processors."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest
import torch
from processes import apart

from onward.training.device.control_groups import Limit, read_limits, read_processors
from onward.training.device.memory import read_total, read_usage

GIB = 1 << 30
CPU = torch.device("cpu")
ONE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
TWO = ("memory.max", "memory.current", "")
UNLIMITED = str((1 << 63) - 4096)
"""What the first version says where there is no limit: more than any machine has."""


def group(folder: Path, version: tuple[str, str, str], limit: str, used: int, files: int) -> None:
    """Write what the kernel shows of a group; `files` of the used bytes are pages of files."""
    folder.mkdir(parents=True, exist_ok=True)
    names, prefix = version[:2], version[2]
    stat = (
        f"anon {used - files}\ninactive_file 7\nactive_file 7\n{prefix}inactive_file {files}\n{prefix}active_file 0\n"
    )
    for name, text in zip((*names, "memory.stat"), (f"{limit}\n", f"{used}\n", stat), strict=True):
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("lines", "groups", "expected"),
    [
        pytest.param("0::/\n", {}, [], id="no limit"),
        pytest.param("0::/\n", {"": (TWO, str(8 * GIB))}, [8], id="a container"),
        pytest.param(
            "0::/system.slice/slurm/job_1/step_0\n",
            {
                "": (TWO, "max"), "system.slice/slurm/job_1": (TWO, str(4 * GIB)),
                "system.slice/slurm/job_1/step_0": (TWO, str(2 * GIB)),
            },
            [2, 4], id="a job of Slurm",
        ),
        pytest.param(
            "4:cpu,memory:/docker/abc\n1:name=systemd:/docker/abc\n",
            {"memory": (ONE, str(3 * GIB))}, [3], id="a container that sees its own group as the root",
        ),
        pytest.param(
            "9:name=systemd:/\n4:memory:/job\n0::/job\n",
            {"memory": (ONE, UNLIMITED), "memory/job": (ONE, str(2 * GIB)), "unified/job": (TWO, "max")},
            [2, int(UNLIMITED) // GIB], id="both versions",
        ),
        pytest.param("0::/user/a:b\n", {"user/a:b": (TWO, str(GIB))}, [1], id="a name with a colon"),
        pytest.param("0::/../../other\n", {"": (TWO, str(GIB))}, [1], id="a group outside of what can be seen"),
    ],
)  # fmt: skip
def test_every_limit_above_a_process_holds(
    lines: str, groups: Mapping[str, tuple[tuple[str, str, str], str]], expected: list[int], tmp_path: Path
) -> None:
    """Of either version, hard or one above which the kernel slows processes down, and of every group up to the root;
    pages of files do not count as used.
    """
    (tmp_path / "cgroup").write_text(lines)
    trees = tmp_path / "fs"
    trees.mkdir()
    if "memory" not in lines:
        (trees / "cgroup.controllers").write_text("cpu memory\n")
    for path, (version, limit) in groups.items():
        group(trees / path, version, limit, used=900, files=600)
    found = read_limits(tmp_path / "cgroup", trees)
    assert expected == [limit.total // GIB for limit in found]
    assert {300} >= {limit.used for limit in found}
    assert [] == read_limits(tmp_path / "none", trees)
    if groups == {"": (TWO, str(8 * GIB))}:  # where the second version slows processes down
        for high, least in (("max", 8), (str(5 * GIB), 5), (str(9 * GIB), 8)):
            (trees / "memory.high").write_text(f"{high}\n")
            assert [least] == [limit.total // GIB for limit in read_limits(tmp_path / "cgroup", trees)]


@pytest.mark.parametrize(("used", "stat", "expected"), [(900, "file 800\n", 900), (900, "inactive_file 901\n", 0)])
def test_what_a_group_uses_is_never_less_than_nothing(used: int, stat: str, expected: int, tmp_path: Path) -> None:
    """The kernel counts while it is read; a kernel that does not tell pages of files apart has none."""
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "cgroup.controllers").touch()
    group(tmp_path, TWO, str(GIB), used, 0)
    (tmp_path / "memory.stat").write_text(stat)
    assert [Limit(GIB, expected)] == read_limits(tmp_path / "cgroup", tmp_path)


def test_what_a_limit_leaves_is_what_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest group decides, as does the machine where it has less than any of them."""
    machine = read_usage(CPU)
    assert machine is not None
    wide, narrow = Limit(1 << 50, 1 << 20), Limit(machine.own + 4096, machine.own)
    for limits in ([wide], [wide, narrow]):
        monkeypatch.setattr("onward.training.device.memory.read_limits", lambda limits=limits: limits)
        usage = read_usage(CPU)
        assert usage is not None
        assert usage.total == read_total(CPU) == min(machine.total, *(limit.total for limit in limits))
        assert (usage.free <= 4096) == (narrow in limits)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        pytest.param("0::/\n", {}, None, id="no limit"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, None, id="a container without a limit"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 1.5, id="a container"),
        pytest.param(
            "0::/pod/container\n", {"pod/cpu.max": "50000 20000", "pod/container/cpu.max": "400000 100000"}, 2.5,
            id="a container of a narrower pod",
        ),
        pytest.param(
            "2:cpu,cpuacct:/job\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
             "cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"}, 3.0,
            id="the first version",
        ),
        pytest.param("2:memory:/\n", {"memory/cpu.max": "1 1"}, None, id="not the processors' tree"),
    ],
)  # fmt: skip
def test_the_narrowest_share_of_processors_holds(
    lines: str, files: Mapping[str, str], expected: float | None, tmp_path: Path
) -> None:
    """Of either version, and of every group up to the root."""
    (tmp_path / "cgroup").write_text(lines)
    trees = tmp_path / "fs"
    trees.mkdir()
    (trees / "cgroup.controllers").write_text("cpu memory\n")
    for name, text in files.items():
        (trees / name).parent.mkdir(parents=True, exist_ok=True)
        (trees / name).write_text(f"{text}\n")
    assert expected == read_processors(tmp_path / "cgroup", trees)


def made_group(controller: str, limits: Mapping[str, str]) -> Generator[Path]:
    """Make a control group of this machine with a limit; files and what they contain, of either version."""
    for tree in (f"/sys/fs/cgroup/{controller}", "/sys/fs/cgroup"):
        folder = Path(tree, f"onward-test-{os.getpid()}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            known = [name for name in limits if (folder / name).exists()]
            for name in known:
                (folder / name).write_text(limits[name])
            if known:
                yield folder
                return
        finally:
            folder.rmdir()
    pytest.skip("no control group with a limit can be made here")


@pytest.fixture
def job() -> Generator[Path]:
    """A control group of this machine with 3 GiB of memory."""
    yield from made_group("memory", {ONE[0]: str(3 * GIB), TWO[0]: str(3 * GIB)})


@pytest.fixture
def slow_job() -> Generator[Path]:
    """A control group of this machine with the time of one and a half processors."""
    yield from made_group("cpu", {"cpu.cfs_quota_us": "150000", "cpu.max": "150000 100000"})


def _in_a_slow_job(folder: str) -> None:
    Path(folder, "cgroup.procs").write_text(str(os.getpid()))
    assert 1.5 == read_processors()


@pytest.mark.slow
def test_the_kernel_s_own_share_is_found(slow_job: Path) -> None:
    """PyTorch counts the processors that it may run on, not how much of their time it gets."""
    assert 0 == apart(_in_a_slow_job, str(slow_job))


def _in_a_job(folder: str) -> None:
    Path(folder, "cgroup.procs").write_text(str(os.getpid()))
    usage = read_usage(CPU)
    assert usage is not None
    assert 3 * GIB == usage.total
    assert 2 * GIB < usage.free < 3 * GIB


def test_the_kernel_s_own_limit_is_found(job: Path) -> None:
    """A process that is put into a group with a limit, as a job of Slurm is, has that much memory."""
    assert 0 == apart(_in_a_job, str(job))
