"""Servers in processes of their own, each on a tiny model."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Mapping
from os import kill
from pathlib import Path

import httpx
from forks import Child

START_S = 120


class Server:
    """`parallama serve` with these arguments, on a port of its own.

    Attributes:
        url: where it answers.
    """

    def __init__(
        self,
        *arguments: str,
        log: Path,
        env: Mapping[str, str | None] | None = None,
        fails_at: Path | None = None,
        optimize: bool = False,
        round_s: float = 0,
        send_s: float | None = None,
    ) -> None:
        """Start it, and wait until it serves.

        Args:
            fails_at: the engine fails as soon as there is this file.
            optimize: its programs run at their speed, and take longer to compile.
            round_s: how much longer a round of its engine takes.
            send_s: how long a client may leave what was sent unread, if not as long as usual.
        """
        self._log = log
        given = {
            "words": ["serve", *arguments, "--port", "0"],
            "fails_at": None if fails_at is None else str(fails_at),
            "round_s": round_s,
            "send_s": send_s,
        }
        with log.open("wb") as stream:
            self.child = Child(
                "servers:run", given, out=stream, err=stream, env=env, optimize=optimize
            )
        try:
            self.url = self.until(r"listening on ([^;\s]+);")
            self.until(r"serving ")
        except BaseException:
            self.child.kill()
            raise

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, pattern: str) -> str:
        """What a pattern finds in the log, as soon as it does."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if found := re.search(pattern, self.log()):
                return found[found.re.groups]
            assert self.child.poll() is None, self.log()
            time.sleep(0.02)
        raise TimeoutError(self.log())

    def client(self, **more: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **more)  # type: ignore[arg-type]

    def signal(self, number: int = signal.SIGTERM) -> None:
        kill(self.child.pid, number)

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.signal()
        return self.child.wait(60)


def run(words: list[str], fails_at: str | None, round_s: float, send_s: float | None) -> int:
    """The child's side."""
    from parallama import __main__

    if send_s is not None:
        from parallama.serve.connections import BoundedConnection

        BoundedConnection.send_s = send_s
    if fails_at is not None or round_s:
        _change_rounds(Path(fails_at) if fails_at else None, round_s)
    sys.argv = ["parallama", *words]
    return __main__.run(words)


def _change_rounds(fails_at: Path | None, longer_s: float) -> None:
    from parallama.inference.slot_runner import SlotRunner

    round_of = SlotRunner.round

    def changed(runner: SlotRunner) -> object:
        if fails_at is not None and fails_at.exists():
            raise RuntimeError("a device is lost")
        found = round_of(runner)
        if runner.scheduler.running:
            time.sleep(longer_s)
        return found

    SlotRunner.round = changed  # type: ignore[method-assign,assignment]
