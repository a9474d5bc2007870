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
        port: bool = True,
        wait: bool = True,
    ) -> None:
        self._log = log
        words = ["serve", *arguments, *(["--port", "0"] if port else [])]
        with log.open("wb") as stream:
            self.child = Child(
                "servers:run", {"words": words}, out=stream, err=stream, env=env, optimize=False
            )
        try:
            self.url = self._until(r"listening on ([^;\s]+);")
            if wait:
                self._until(r"serving ")
        except BaseException:
            self.child.kill()
            raise

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _until(self, pattern: str) -> str:
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


def run(words: list[str]) -> int:
    """The child's side."""
    import one_at_a_time

    from parallama import __main__

    sys.modules["parallama.inference.continuous"] = one_at_a_time
    sys.argv = ["parallama", *words]
    return __main__.run(words)
