"""Processes with devices that the tests call functions in: one device count each, for life.

A torch-xla process cannot change its device count. Messages are pickles over a pipe between a test
and its own child.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pickle
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forks import Child

CALL_LIMIT_S = 600


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
    """A worker ended or did not answer; the text has the end of what it wrote."""


class Worker:
    """A process with so many devices. It runs one case at a time, so two never compute at once."""

    def __init__(self, devices: int, log: Path, *, keep_hlo: bool, optimize: bool) -> None:
        self.devices = devices
        self._log = log
        self._pipe, theirs = Pipe()
        with log.open("wb") as stream:
            self._process = Child(
                "workers:answer_calls",
                {"devices": devices, "keep_hlo": keep_hlo},
                out=stream,
                err=stream,
                cwd=Path(__file__).parent,
                pipe=theirs.fileno(),
                optimize=optimize,
            )
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, target: str, **arguments: Any) -> Any:
        """Run `module:function` with plain Python and CPU tensors, and give back what it returns.

        Raises:
            CaseError: it raised.
            WorkerDied: the process ended, or took longer than the limit.
        """
        try:
            self._pipe.send_bytes(pickle.dumps((target, arguments)))
            answered = self._pipe.poll(CALL_LIMIT_S)
            reply = self._pipe.recv_bytes() if answered else b""
        except (EOFError, OSError):
            ended = f"died, exit code {self._process.wait(10)}"
            raise WorkerDied(self._obituary(target, ended)) from None
        if not answered:
            self.stop()
            raise WorkerDied(self._obituary(target, f"took more than {CALL_LIMIT_S} s"))
        status, *content = pickle.loads(reply)
        if status == "error":
            raise CaseError(*content)
        return content[0]

    def _obituary(self, target: str, what: str) -> str:
        said = self._log.read_text(errors="replace")[-3000:]
        return f"{target}: the worker with {self.devices} device(s) {what}\n{said}"

    def stop(self) -> None:
        self._pipe.close()
        with contextlib.suppress(TimeoutError):
            self._process.wait(10)


class Workers:
    """The workers by device count, started when first asked for, and again after one died.

    `workers[8].call("device_cases:forward", mesh="1x8", ...)`.
    """

    def __init__(self, folder: Path, *, keep_hlo: bool = False, optimize: bool = False) -> None:
        self._folder, self._keep_hlo, self._optimize = folder, keep_hlo, optimize
        self._by_count: dict[int, Worker] = {}

    def __getitem__(self, devices: int) -> Worker:
        worker = self._by_count.get(devices)
        if worker is None or not worker.alive:
            log = self._folder / f"worker-{devices}.log"
            worker = self._by_count[devices] = Worker(
                devices, log, keep_hlo=self._keep_hlo, optimize=self._optimize
            )
        return worker

    def stop(self) -> None:
        for worker in self._by_count.values():
            worker.stop()


class Auditors:
    """Workers that keep the HLO of their programs; a process decides on that once.

    `auditors("judged", folder, "1x8", ...)` runs a function of `audit_cases`.
    """

    def __init__(self, folder: Path) -> None:
        self._workers = Workers(folder, keep_hlo=True)

    def __call__(self, case: str, folder: str, mesh: str, **arguments: Any) -> Any:
        """Run a case of `audit_cases`, or of the module that it names."""
        devices = math.prod(int(size) for size in mesh.split("x"))
        target = case if ":" in case else f"audit_cases:{case}"
        return self._workers[devices].call(target, folder=folder, mesh=mesh, **arguments)

    def stop(self) -> None:
        self._workers.stop()


def answer_calls(descriptor: int, devices: int, keep_hlo: bool) -> None:
    """A worker's life: run what it is asked for until the tests close the pipe."""
    from parallama.engine.torch_xla import backends

    backends.start("cpu", devices, keep_hlo=keep_hlo)
    pipe = Connection(descriptor)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            target, arguments = pickle.loads(message)
            module, _, function = target.partition(":")
            result = getattr(importlib.import_module(module), function)(**arguments)
            reply: tuple[Any, ...] = ("result", result)
        except Exception as error:
            reply = ("error", type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))
