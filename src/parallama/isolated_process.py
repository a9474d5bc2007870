"""Run one of our modules in a process of its own, with a time limit. Pure.

What crashes or hangs there is told here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code; negative for the signal that ended it, None if it took longer than the
            limit.
        out: its standard output.
        err: its standard error.
    """

    code: int | None
    out: str
    err: str

    @property
    def how(self) -> str:
        """In words: `died of SIGSEGV`, `ended with exit code 3`, `did not end in time`."""
        if self.code is None:
            return "did not end in time"
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        try:
            return f"died of {signal.Signals(-self.code).name}"
        except ValueError:
            return f"died of signal {-self.code}"

    @property
    def last_words(self) -> str:
        """The last line of its standard error that says something."""
        said = [line.strip() for line in self.err.splitlines() if line.strip()]
        return said[-1] if said else ""


def run_module(module: str, *arguments: str, limit_s: float) -> Ended:
    """Run `python -m module` for at most `limit_s` seconds; then it and what it started are killed.

    Args:
        *arguments: of its command line.
    """
    # Files, not pipes: a process that the module left behind would keep a pipe open.
    # -P: nothing is imported from the folder we stand in.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(code=code, out=texts[0], err=texts[1])
