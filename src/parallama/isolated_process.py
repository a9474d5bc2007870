"""Run one of our modules in a process of its own, with a time limit. Pure.

What crashes or hangs there is told here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from .errors import RunError, lines, shown


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code; negative for the signal that ended it, None if it took longer than the
            limit.
        out: its standard output.
        err: its standard error.
        limit_s: the limit.
    """

    code: int | None
    out: str
    err: str
    limit_s: float | None = None

    @property
    def how(self) -> str:
        """In words: `died of SIGSEGV`, `ended with exit code 3`, `did not end in time`."""
        return how_ended(self.code)

    @property
    def last_words(self) -> str:
        """The last line of its standard error that says something."""
        said = [line.strip() for line in self.err.splitlines() if line.strip()]
        return said[-1] if said else ""

    def reply(self, what: str) -> dict[str, Any]:
        """The JSON object in the last line of its standard output.

        Args:
            what: what ran in the process, for messages.

        Raises:
            RunError: it did not end with exit code 0, or that line is no JSON object.
        """
        if self.code != 0:
            limit = "" if self.limit_s is None else f" within {self.limit_s:g} s"
            how = f"did not end{limit}" if self.code is None and limit else self.how
            words = self.last_words
            raise RunError(lines(f"{what} {how}", f"it said: {words[:200]}" if words else ""))
        printed = [line for line in self.out.splitlines() if line.strip()]
        found = _object(printed[-1]) if printed else None
        if found is None:
            last = f"ended with {shown(printed[-1], 160)}" if printed else "printed nothing"
            raise RunError(
                lines(
                    f"{what} gave no answer: its process ended with exit code 0 and {last}",
                    "expected a JSON object in the last line",
                )
            )
        return found


def how_ended(code: int | None) -> str:
    """An exit code in words; None is a process that took longer than its limit."""
    if code is None:
        return "did not end in time"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
    return Ended(code=code, out=texts[0], err=texts[1], limit_s=limit_s)
