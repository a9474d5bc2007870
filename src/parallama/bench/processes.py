"""Engines in processes of their own, as the benchmark holds them. They take turns: one computes, the others wait."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ParallamaError, RunError, from_reply, lines, shown

START_LIMIT_S, ASK_LIMIT_S = 600.0, 1200.0
REST_S = 0.25
"""An engine's threads may go on looking for work after its reply, each on a core (transformers' were seen to for 3 to 12 ms); so long nobody else has the turn."""


class EngineProcess:
    """A running engine.

    Args:
        engine: what the worker is to make: `engine`, `model`, `mesh`, `devices`, `dtype`, `backend`, `threads`.
        processes: how many the engine itself has; more than one are started by torchrun.
        ask_limit_s: how long one command may take.

    Raises:
        ParallamaError: it could not start; the message says why. What parallama itself refuses is the same error here.

    Attributes:
        started: what it said when it was ready.
    """

    def __init__(
        self, engine: Mapping[str, Any], *, processes: int = 1, ask_limit_s: float = ASK_LIMIT_S
    ) -> None:
        self.name = str(engine["engine"])
        self._ask_limit_s = ask_limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="parallama-bench-")
        path = Path(self._folder.name) / "socket"
        self._log = Path(self._folder.name) / "log"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        document = json.dumps({**engine, "socket": str(path), "born": time.time()})
        launcher = [sys.executable, "-m"]
        if processes > 1:
            launcher += [
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
                "-m",
            ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*launcher, "parallama.bench.worker", document],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._channel: socket.socket | None = None
        try:
            self._channel = self._accept(listener)
            self._stream = self._channel.makefile("rw", encoding="utf-8", newline="\n")
            self.started = self._receive(START_LIMIT_S)
        except ParallamaError:
            self.close()
            raise
        finally:
            listener.close()

    @property
    def pid(self) -> int:
        """The process, and the group of all that it starts."""
        return self._process.pid

    def _accept(self, listener: socket.socket) -> socket.socket:
        listener.settimeout(1.0)
        ends = time.monotonic() + START_LIMIT_S
        while time.monotonic() < ends:
            try:
                return listener.accept()[0]
            except TimeoutError:
                if self._process.poll() is not None:
                    raise RunError(
                        lines(f"{self.name} ended at its start: {self._last_words()}")
                    ) from None
        raise RunError(lines(f"{self.name} did not start in {START_LIMIT_S:.0f} s"))

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have one command done and return its reply, once its threads are at rest.

        Raises:
            RunError: the engine can't do it, has died, or takes longer than the limit.
        """
        try:
            self._stream.write(json.dumps({"do": do, **arguments}) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            raise RunError(lines(f"{self.name} has died: {self._last_words()}")) from None
        reply = self._receive(self._ask_limit_s)
        time.sleep(REST_S)
        return reply

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._channel is not None
        self._channel.settimeout(limit_s)
        try:
            line = self._stream.readline()
        except TimeoutError:
            self.close()
            raise RunError(lines(f"{self.name} took more than {limit_s:g} s")) from None
        except OSError:
            line = ""
        if not line:
            raise RunError(lines(f"{self.name} has died: {self._last_words()}"))
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise RunError(
                lines(
                    f"{self.name} answered {shown(line, 160)}",
                    "expected a JSON object in one line",
                )
            )
        if "refused" in reply:
            raise from_reply(reply)
        if "error" in reply:
            raise RunError(lines(f"{self.name}: {reply['error']}"))
        return reply

    def _last_words(self) -> str:
        words = [
            line for line in self._log.read_text(errors="replace").splitlines() if line.strip()
        ]
        return words[-1].strip()[:200] if words else "it said nothing"

    def close(self) -> None:
        """End the process and all of its own."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)
            self._channel.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
