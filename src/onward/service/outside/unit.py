"""The systemd unit of a watching daemon."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

UNIT = """\
[Unit]
Description=Onward: cumulative fine-tuning of {run}
After=local-fs.target network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
User={user}
ExecStart={python} -m onward watch --run {quoted}
ExecStop={python} -m onward stop --run {quoted}
WorkingDirectory={quoted}
KillSignal=SIGTERM
KillMode=mixed
TimeoutStartSec=infinity
TimeoutStopSec=15min
WatchdogSec=10min
Restart=on-failure
RestartSec=10s
# 2: the config is refused; 4: another process owns the run; 5: the state needs a person
RestartPreventExitStatus=2 4 5

[Install]
WantedBy=multi-user.target
"""


def systemd_unit(run: Path) -> str:
    """Return a unit that watches a run: Type=notify with a watchdog, restarted on failure, stopped by committing."""
    absolute = str(run.absolute())
    quoted = f'"{absolute}"' if " " in absolute else absolute
    quoted = quoted.replace("%", "%%")
    return UNIT.format(run=absolute.replace("%", "%%"), quoted=quoted, user=getpass.getuser(), python=sys.executable)
