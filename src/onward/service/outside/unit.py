"""The systemd unit of a watching daemon: its user, what it may access, and paths as systemd reads them.

Rules of quoting: systemd.syntax(7), systemd.service(5) under "Command lines", systemd.unit(5) under "Specifiers".
"""

from __future__ import annotations

import os
import pwd
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onward.errors import UsageError
from onward.layout import LEDGER
from onward.text import printable

UNIT = """\
[Unit]
Description=Onward: cumulative fine-tuning of {description}
After=local-fs.target network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess={notifiers}
{user}
UMask={umask:04o}
{environment}ExecStart={python} -P -m onward watch --run {run}{devices}
ExecStop={python} -P -m onward stop --run {run}
WorkingDirectory={directory}
KillSignal=SIGTERM
KillMode=mixed
TimeoutStartSec=infinity
TimeoutStopSec=15min
WatchdogSec=10min
Restart=on-failure
RestartSec=10s
# 2: the config is refused; 4: another process owns the run; 5: the state needs a person
RestartPreventExitStatus=2 4 5

# What it may touch. A notify.command that writes elsewhere needs a ReadWritePaths of its own.
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
{writable}
PrivateTmp={private_tmp}
ProtectControlGroups=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RestrictAddressFamilies={families}
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
# Not set: MemoryDenyWriteExecute, since torch makes code at run time; PrivateDevices, which hides GPUs.

[Install]
WantedBy=multi-user.target
"""
KEPT_VARIABLES = ("ONWARD_CACHE", "XDG_CACHE_HOME", "HF_HOME")
"""Variables that say where models are kept; the unit gets those that are set when it is printed."""
THREADS = "OMP_NUM_THREADS"
"""The variable with the number of threads, on which bits depend."""
GPUS = "CUDA_VISIBLE_DEVICES"
"""The variable with the GPUs that a process sees; with no value, none."""
FAMILIES = "AF_UNIX AF_INET AF_INET6"
"""Families of addresses that a daemon uses; ranks also look for the machine's networks with AF_NETLINK."""
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))
"""What PrivateTmp replaces."""


@dataclass(frozen=True)
class Host:
    """What a unit takes over from the process that prints it."""

    uid: int
    umask: int
    python: str
    environment: Mapping[str, str]
    machine: str = field(default_factory=socket.gethostname)

    @classmethod
    def here(cls) -> Host:
        """Return the values of this process."""
        umask = os.umask(0o077)
        os.umask(umask)
        return cls(os.geteuid(), umask, sys.executable, dict(os.environ))

    @property
    def kept(self) -> dict[str, str]:
        """Those of `KEPT_VARIABLES` that are set."""
        return {name: self.environment[name] for name in KEPT_VARIABLES if self.environment.get(name)}

    @property
    def gpus(self) -> dict[str, str]:
        """`GPUS` if it is set, be it to nothing: without it, every daemon of a machine would take the first one."""
        return {GPUS: self.environment[GPUS]} if GPUS in self.environment else {}


def systemd_unit(
    run: Path,
    user: str | None = None,
    host: Host | None = None,
    *,
    devices: str = "1",
    on_cpu: bool = False,
    threads: int | None = None,
) -> str:
    """Return a unit that watches a run: Type=notify with a watchdog, restarted on failure, stopped by committing.

    Args:
        user: who runs it; by default the user who prints it or, for root, the owner of the run's directory.
        devices: how many, `N` or `A:B`.
        on_cpu: whether GPUs are hidden from it.
        threads: how many it computes with; None for as many as PyTorch takes.

    Raises:
        UsageError: there is no such user, or the path cannot be written in a unit.
    """
    host = host or Host.here()
    run = run.absolute()
    require_printable("unit", str(run), host.python)
    account = _account(run, user, host.uid)
    in_temporary = any(path.is_relative_to(place) for path in (run, run.resolve()) for place in TEMPORARY)
    variables = {**host.kept, **({THREADS: threads} if threads else {}), **({GPUS: ""} if on_cpu else host.gpus)}
    is_alone = devices == "1"  # otherwise rank 0, a child of the main process, is what notifies
    return UNIT.format(
        notifiers="main" if is_alone else "all",
        families=FAMILIES if is_alone else f"{FAMILIES} AF_NETLINK",
        description=_plain(str(run)),
        user="\n".join(_user_lines(account, run)),
        umask=host.umask,
        environment="".join(f"Environment={_escaped(f'{name}={value}')}\n" for name, value in variables.items()),
        python=_program(host.python),
        run=_escaped(str(run)).replace("$", "$$"),
        devices="" if is_alone else f" --devices {devices}",
        directory=_plain(str(run)),
        writable="\n".join(f"ReadWritePaths={_escaped(path)}" for path in _writable(run, account, host.environment)),
        private_tmp="no" if in_temporary else "yes",
    )


def require_printable(kind: str, *paths: str) -> None:
    """Refuse paths that cannot be written into a text file line by line.

    Args:
        kind: what would contain them: `unit`.

    Raises:
        UsageError: one of them has control characters.
    """
    for path in paths:
        if printable(path) != path:
            hint = "Move it to a path of printable characters."
            raise UsageError(f"a {kind} cannot use a path with control characters", where=path, hint=hint)


def _account(run: Path, user: str | None, uid: int) -> pwd.struct_passwd:
    try:
        if user is not None:
            return pwd.getpwnam(user)
        return pwd.getpwuid(uid or run.stat().st_uid)
    except KeyError:
        hint = "Name an existing user: onward service --user NAME"
        raise UsageError("there is no such user", where=user or uid or run.stat().st_uid, hint=hint) from None


def _user_lines(account: pwd.struct_passwd, run: Path) -> Iterator[str]:
    if account.pw_uid == 0:
        owner = "the run's directory belongs to root" if run.stat().st_uid == 0 else "it was asked for"
        yield f"# Runs as root, since {owner}. To run as another: chown -R NAME the directory, and print this again."
    yield f"User={account.pw_name}"


def _writable(run: Path, account: pwd.struct_passwd, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the run, its inbox and its ledger if they are elsewhere, and the caches; `-`: it need not exist."""
    yield str(run)
    for place in ((run / "inbox").resolve(), (run / LEDGER).resolve().parent):
        if not place.is_relative_to(run.resolve()):
            yield f"-{place}"
    home = Path(account.pw_dir)
    shared = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    yield f"-{environment.get('ONWARD_CACHE') or shared / 'onward'}"
    yield f"-{environment.get('HF_HOME') or shared / 'huggingface'}"


def _plain(path: str) -> str:
    """Return a path that is a whole value: nothing is quoted, but a backslash at the end would join the next line."""
    text = path.replace("%", "%%")
    return f"{text}/" if text.endswith(("\\", " ")) else text


def _escaped(word: str) -> str:
    """Return a word of a value with several: if it is not plain, in double quotes with C escapes."""
    text = word.replace("%", "%%")
    if _is_bare(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _program(path: str) -> str:
    """Return the program of a command; env(1) runs one whose path has quotes or backslashes, which systemd refuses."""
    if any(character in path for character in "\"'\\"):
        return f"/usr/bin/env {_escaped(path).replace('$', '$$')}"
    return _escaped(path)


def _is_bare(text: str) -> bool:
    return not any(character.isspace() or character in "\"'\\;" for character in text)
