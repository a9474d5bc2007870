"""Runs a command, and ends it with everything that it started once standard input closes. Pure.

Run as `python -m parallama.bench.keeper COMMAND ...` by a process that keeps the other end of its
standard input. The system closes that end, too, however the process dies.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_STDIN = 0
_PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


def main() -> None:
    """Run the command that the arguments are."""
    _adopt_orphans()
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    signal.set_wakeup_fd(wakes)
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while process.poll() is None:
        ready, _, _ = select.select([_STDIN, woken], [], [])
        if _STDIN in ready:
            break
        os.read(woken, 1)
    _end_all()


def _adopt_orphans() -> None:
    """Become the parent of every process below whose own parent ends (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_all() -> None:
    """Kill the children until there are none: those of a killed child become children in turn."""
    while True:
        for child in _parents().get(os.getpid(), []):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def family(pid: int) -> list[int]:
    """A process and all below it, where the system tells (Linux)."""
    children = _parents()
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def _parents() -> dict[int, list[int]]:
    """Every parent with its children."""
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            # The name, in parentheses, may hold spaces and parentheses itself.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    main()
