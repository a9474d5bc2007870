"""Engines in processes of their own, as the benchmark holds them.

They take turns: one computes, the others wait. With an engine ends everything that it started.
"""

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

from ..errors import RunError, from_reply, lines, shown
from .keeper import family
from .profile import kernel_names

START_LIMIT_S, ASK_LIMIT_S = 600.0, 1200.0
REST_S = 0.25
"""Pause after each reply, in which nobody computes.

An engine's threads may look for work for a while, each on a core: transformers' for 3 to 12 ms.
"""
_GRACE_S = 10.0  # for an engine that is asked to end


class EngineProcess:
    """A running engine.

    Args:
        engine: what the worker is to make: `engine`, `model`, `mesh`, `devices`, `dtype`,
            `backend`, `threads`.
        processes: how many the engine itself has; more than one are started by torchrun.
        ask_limit_s: how long one command may take.

    Raises:
        ParallamaError: it could not start; the message says why. What parallama itself refuses is
            the same error here.

    Attributes:
        started: what it said when it was ready.
    """

    def __init__(
        self, engine: Mapping[str, Any], *, processes: int = 1, ask_limit_s: float = ASK_LIMIT_S
    ) -> None:
        self.name = str(engine["engine"])
        self._ask_limit_s = ask_limit_s
        self._profiled = bool(engine.get("profiled"))
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="parallama-bench-")
        self._log = Path(self._folder.name) / "log"
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                path = str(Path(self._folder.name) / "socket")
                listener.bind(path)
                listener.listen(1)
                document = json.dumps({**engine, "socket": path, "born": time.time()})
                self._process = self._launch(document, processes)
                self._channel = self._accept(listener, self._process)
            self._stream = self._channel.makefile("rw", encoding="utf-8", newline="\n")
            self.started = self._receive(START_LIMIT_S)
        except BaseException:  # Ctrl-C, too
            self.close(at_once=True)
            raise

    @property
    def pid(self) -> int:
        """The process below which the whole engine is; it leads a group of its own."""
        assert self._process is not None
        return self._process.pid

    def _launch(self, document: str, processes: int) -> subprocess.Popen[bytes]:
        """Start the engine below a `keeper`, which lives as long as its standard input."""
        module = [sys.executable, "-m"]
        launcher = [*module, "parallama.bench.keeper", *module]
        if processes > 1:
            launcher += ["torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={processes}", "-m"]
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [*launcher, "parallama.bench.worker", document],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _accept(self, listener: socket.socket, process: subprocess.Popen[bytes]) -> socket.socket:
        listener.settimeout(1.0)
        ends = time.monotonic() + START_LIMIT_S
        while time.monotonic() < ends:
            try:
                return listener.accept()[0]
            except TimeoutError:
                if process.poll() is not None:
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
            self.close(at_once=True)
            raise RunError(lines(f"{self.name} took more than {limit_s:g} s")) from None
        except OSError:
            line = ""
        if not line:
            raise RunError(lines(f"{self.name} has died: {self._last_words()}"))
        try:
            # It may have died within a line.
            reply = json.loads(line) if line.endswith("\n") else None
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
        try:
            said = self._log.read_text(errors="replace").splitlines()
        except OSError:  # the engine was closed
            said = []
        words = [line for line in said if line.strip()]
        return words[-1].strip()[:200] if words else "it said nothing"

    def close(self, *, at_once: bool = False) -> None:
        """End the engine and everything that it started.

        Args:
            at_once: without waiting for it to end by itself.
        """
        process, left = self._process, []
        if process is not None and self._profiled and process.poll() is None:
            left = [kernel_names(pid) for pid in family(process.pid)]
        try:
            if self._channel is not None:
                with contextlib.suppress(OSError):
                    self._channel.shutdown(socket.SHUT_RDWR)
                self._channel.close()
            if process is not None and not at_once:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
        finally:
            if process is not None and process.stdin is not None:
                process.stdin.close()  # its keeper kills what there still is
                process.wait()
            for file in left:
                file.unlink(missing_ok=True)
            self._folder.cleanup()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(at_once=error is not None)
