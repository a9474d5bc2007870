"""Servers that a benchmark starts itself: ours and transformers' own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import httpx2

from ..errors import RunError, UsageError, lines
from ..files.find import find
from ..remote_server import MODELS, RemoteServer
from .serve_load import Target
from .serve_options import OwnServer

START_LIMIT_S = 900.0
_LOOK_S = 0.25
_TRANSFORMERS = "from transformers.cli.transformers import app; app()"


class ServerProcess:
    """A server in a process of its own, below a `keeper`: it ends with this process, too.

    Args:
        name: for messages.
        command: that starts it on a port of this machine.
        threads: cores that it may use; all if None.

    Raises:
        RunError: it ended, or was not ready in `START_LIMIT_S`; the message has its last words.
    """

    def __init__(
        self, name: str, command: Callable[[int], Sequence[str]], threads: int | None
    ) -> None:
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="parallama-bench-")
        self._log = Path(self._folder.name) / "log"
        port = _free_port()
        self.server = RemoteServer.parse(f"http://127.0.0.1:{port}")
        keeper = [sys.executable, "-m", "parallama.bench.keeper"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*keeper, *command(port)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=None if threads is None else lambda: _limit_cores(threads),
            )
        try:
            self._wait()
        except BaseException:  # Ctrl-C, too
            self.close()
            raise

    def _wait(self) -> None:
        """Wait until it says that it is ready."""
        ends = time.monotonic() + START_LIMIT_S
        with httpx2.Client(base_url=self.server.url, trust_env=False) as http:
            while time.monotonic() < ends:
                if self._process.poll() is not None:
                    raise RunError(lines(f"{self._name} ended at its start: {self._last_words()}"))
                try:
                    answer = http.get("/health")
                    if answer.status_code == httpx2.codes.NOT_FOUND:
                        answer = http.get(MODELS)
                    if answer.status_code == httpx2.codes.OK:
                        return
                except httpx2.TransportError:
                    pass
                time.sleep(_LOOK_S)
        raise RunError(lines(f"{self._name} was not ready in {START_LIMIT_S:.0f} s"))

    def _last_words(self) -> str:
        said = self._log.read_text(errors="replace").splitlines()
        words = [line for line in said if line.strip()]
        return words[-1].strip()[:200] if words else "it said nothing"

    def close(self) -> None:
        """End it and what it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # its keeper kills what there is
        self._process.wait()
        self._folder.cleanup()


def start_ours(model: str, own: OwnServer) -> tuple[ServerProcess, Target]:
    """`parallama serve` for a model."""

    def command(port: int) -> list[str]:
        told = [sys.executable, "-m", "parallama", "serve", model, "--port", str(port)]
        return [*told, *own.arguments()]

    process = ServerProcess("parallama serve", command, own.threads)
    return process, Target(label="parallama", server=process.server)


def check_transformers() -> None:
    """Raise `UsageError` where `transformers serve` cannot start."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
    if missing:
        raise UsageError(
            lines(
                f"--peer transformers needs {', '.join(missing)}",
                "run: pip install 'parallama[bench]'",
            )
        )


def start_transformers(model: str, own: OwnServer) -> tuple[ServerProcess, Target]:
    """`transformers serve --continuous-batching` for the same model, dtype and cores."""
    location = find(model).location
    if not location.is_dir():
        raise UsageError(lines(f"--peer transformers with {model!r}", "expected a model folder"))
    folder = str(location)

    def command(port: int) -> list[str]:
        told = [sys.executable, "-c", _TRANSFORMERS, "serve", folder, "--continuous-batching"]
        told += ["--device", "cpu", "--dtype", own.dtype, "--log-level", "error"]
        return [*told, "--host", "127.0.0.1", "--port", str(port)]

    process = ServerProcess("transformers serve", command, own.threads)
    return process, Target(
        label="transformers", server=process.server, model=folder, dialect="transformers"
    )


def _limit_cores(threads: int) -> None:
    """Let this process run on so many cores only (Linux)."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
