"""A shell script that starts a program, passes a scheduler's notice on to it, and waits until it has ended."""

from __future__ import annotations

WAIT = """\
# The signal is forwarded to the run, which finishes its step, commits and ends. `wait` returns after a trap, so it is
# called again until the process has ended.
noticed=
trap 'noticed=1; kill -s {notice} "$process" 2>/dev/null' {notice}
{command} &
process=$!
[ -z "$noticed" ] || kill -s {notice} "$process" 2>/dev/null  # it came before the process was known here
while :; do
  wait "$process"
  status=$?
  kill -s 0 "$process" 2>/dev/null || break
done
"""


def start_and_wait(command: str, notice: str) -> str:
    """Return the script's lines, in the language of any POSIX shell; they set `status`, and `noticed` after a notice.

    Args:
        command: the command to start, quoted for a shell.
        notice: the signal, as `trap` and `kill` take it.
    """
    return WAIT.format(command=command, notice=notice)
