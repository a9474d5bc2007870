"""Fixtures: `workers[n]` is a process with `n` virtual devices, `auditors` are such processes that keep the HLO of their programs, `models` makes tiny random models."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
START_LIMIT_S, CALL_LIMIT_S = 120, 600


class CaseError(Exception):
    """A case failed in its worker.

    Attributes:
        kind: name of the exception's type there.
        message: its text.
    """

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}\n--- in the worker ---\n{trace}")
        self.kind = kind
        self.message = message


class WorkerDied(Exception):
    """A worker process ended or did not answer; the text has the end of its standard error."""


class Worker:
    """A process with so many devices, for life. `call` runs one case at a time, so two workers never compute at once."""

    def __init__(self, devices: int, log: Path, *, keep_hlo: bool = False) -> None:
        self.devices = devices
        self._log = log
        self._pipe, theirs = Pipe()
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_"))
        }
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    str(HERE / "worker.py"),
                    str(theirs.fileno()),
                    str(devices),
                    "hlo" if keep_hlo else "",
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=environment,
                cwd=HERE,
            )
        theirs.close()
        self._receive("start", START_LIMIT_S)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, target: str, **kwargs: Any) -> Any:
        """Run `module:function` with plain Python and CPU tensors, and give back what it returns.

        Raises:
            CaseError: it raised.
            WorkerDied: the process ended, or took longer than the limit.
        """
        try:
            self._pipe.send_bytes(pickle.dumps((target, kwargs)))
        except OSError:
            raise WorkerDied(self._obituary(target)) from None
        status, *content = self._receive(target, CALL_LIMIT_S)
        if status == "error":
            raise CaseError(*content)
        return content[0]

    def _receive(self, what: str, limit_s: int) -> Any:
        try:
            if self._pipe.poll(limit_s):
                return pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise WorkerDied(self._obituary(what)) from None
        self.stop()
        raise WorkerDied(
            f"{what} on {self.devices} device(s) took more than {limit_s} s\n{self._tail()}"
        )

    def _obituary(self, what: str) -> str:
        try:
            code: Any = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = "none yet"
        return f"the worker with {self.devices} device(s) died in {what}, exit code {code}\n{self._tail()}"

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        self._pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Workers:
    """The workers by device count, started when first asked for, and again after one died."""

    def __init__(self, folder: Path, *, keep_hlo: bool = False) -> None:
        self._folder, self._keep_hlo = folder, keep_hlo
        self._by_count: dict[int, Worker] = {}

    def __getitem__(self, devices: int) -> Worker:
        worker = self._by_count.get(devices)
        if worker is None or not worker.alive:
            worker = self._by_count[devices] = Worker(
                devices, self._folder / f"worker-{devices}.log", keep_hlo=self._keep_hlo
            )
        return worker

    def stop(self) -> None:
        for worker in self._by_count.values():
            worker.stop()


class Auditors:
    """Workers that keep the HLO of their programs; a process decides on that once."""

    def __init__(self, folder: Path) -> None:
        self._workers = Workers(folder, keep_hlo=True)

    def __call__(self, case: str, folder: str, mesh: str, **arguments: Any) -> Any:
        """Run a case of `audit_cases`, or of the module that it names."""
        devices = math.prod(int(size) for size in mesh.split("x"))
        target = case if ":" in case else f"audit_cases:{case}"
        return self._workers[devices].call(target, folder=folder, mesh=mesh, **arguments)

    def stop(self) -> None:
        self._workers.stop()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two processes of pytest (`-n 2 --dist loadfile`): all files that compute in workers go to one of them, so that there is one set of workers; the others wait for processes of their own."""
    from xdist.scheduler import LoadFileScheduling

    sharing = {
        path.name
        for path in HERE.glob("test_*.py")
        if re.search(r"\b(workers|auditors): ", path.read_text(encoding="utf-8"))
    }
    sharing -= {
        "test_cli.py",
        "test_export.py",
    }  # they mostly run commands, and need a worker for a few cases only

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "workers" if Path(file).name in sharing else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """`workers[8].call("device_cases:forward", mesh="1x8", ...)`."""
    made = Workers(tmp_path_factory.mktemp("workers"))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def auditors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Auditors]:
    """`auditors("judged", folder, "1x8", ...)` runs a function of `audit_cases`."""
    made = Auditors(tmp_path_factory.mktemp("audits"))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`models(heads=9, kv_heads=3)` is a `reference.Tiny`: a random model in memory and in a folder."""
    from reference import TinyModels

    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def killer() -> Iterator[Any]:
    """`killer("train", log, options=[...])` runs a case of `kill_cases` in a process that may be killed."""
    from kill_cases import Killer

    made = Killer()
    yield made
    made.stop()
