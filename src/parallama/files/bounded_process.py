"""A module of this package in a process of its own, which answers line by line within limits. Pure.

What a checkpoint brings (a chat template, a tokenizer's patterns) may loop for ever or fill the
memory. A process can be ended, from any thread. It is started with the first question, and kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO

from ..errors import RunError, lines, shown
from ..isolated_process import how_ended

_START_LIMIT_S, _END_LIMIT_S = 120.0, 10.0
_READY = "ready"


class Ended(Exception):
    """The process did not answer; the text says why."""


class _Broken(Ended):
    """The process ended, or answered something that is no reply."""


class BoundedProcess:
    """The other side of `serve`. May be used from any thread.

    Args:
        module: a module that calls `serve` when it is run.
        what: it does, for messages: `renders chat templates`.
        replies: the keys of its answers, of which each has one.
        first: makes the line that the module reads before it serves, if it does so.
    """

    def __init__(
        self, module: str, what: str, replies: Collection[str], first: Callable[[], bytes] = bytes
    ) -> None:
        self._module = module
        self._what = what
        self._replies = replies
        self._first = first
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process, if one was started."""
        return self._process

    def ask(self, line: bytes, *, limit_s: float, limit_bytes: int) -> dict[str, str]:
        """What the module answers to a line.

        Args:
            limit_s: how long the answer may take.
            limit_bytes: how long it may be.

        Raises:
            Ended: there is no answer within the limits. The next question starts a new process.
            RunError: the process does not start.
        """
        with self._lock:
            process = self._running()
            try:
                return _read(_ask(process, line, limit_s, limit_bytes), self._replies)
            except _Broken as error:
                self.close()
                raise Ended(f"broke its process, which {error}") from None
            except Ended:
                self.close()
                raise

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            first = self._first()
            # -P: the folder we stand in is no place to import from.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            weakref.finalize(self, _end, self._process)
            try:
                _read(_ask(self._process, first, _START_LIMIT_S, 10_000), (_READY,))
            except Ended as error:
                self.close()
                raise RunError(
                    lines(
                        f"the process that {self._what} {error}",
                        f"expected it to say that it is ready, within {_START_LIMIT_S:g} s",
                    )
                ) from None
        return self._process


def serve(
    answer: Callable[[bytes], Mapping[str, str]],
    out: IO[bytes],
    *,
    limit_s: Callable[[bytes], float],
    memory_bytes: int,
) -> None:
    """Answer what comes in, line by line, until the input ends. Everything is imported by now.

    Args:
        answer: a line to the reply.
        out: from `own_output`, before anything was imported that may print.
        limit_s: a line to how long the answer may take.
        memory_bytes: how much more memory this process may take from here on.
    """
    os.chdir("/")
    _limit(memory_bytes)
    _say(out, {_READY: ""})
    for line in sys.stdin.buffer:
        # Should this process be left behind while it works, it ends by itself.
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + 2 * limit_s(line)) + 1
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
        _say(out, answer(line))


def own_output() -> IO[bytes]:
    """Standard output for replies alone: what others print goes to standard error from here on."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def limit_memory(more_bytes: int) -> None:
    """From here on this process gets no more than so much memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _limit(memory_bytes: int) -> None:
    """From here on: no more than so much memory, and no file is opened or grows."""
    limit_memory(memory_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _say(out: IO[bytes], reply: Mapping[str, str]) -> None:
    try:
        out.write(json.dumps(reply).encode() + b"\n")
    except MemoryError:
        out.write(b'{"broken": "MemoryError: the text is too long"}\n')
    out.flush()


def _ask(process: subprocess.Popen[bytes], line: bytes, limit_s: float, limit_bytes: int) -> bytes:
    """Write a line, and read one."""
    assert process.stdin is not None and process.stdout is not None
    until = time.monotonic() + limit_s
    inward, outward = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(inward, False)
    left, found = memoryview(line), bytearray()
    while True:
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise Ended(f"does not end within {limit_s:g} s")
        poll = select.poll()
        poll.register(outward, select.POLLIN)
        if left:
            poll.register(inward, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poll.poll(1000 * seconds)}
        try:
            if inward in ready:
                left = left[os.write(inward, left[:65536]) :]
            if outward in ready:
                part = os.read(outward, 1 << 20)
                if not part:
                    raise _Broken(_how(process))
                found += part
        except BlockingIOError:
            continue
        except BrokenPipeError:
            raise _Broken(_how(process)) from None
        if len(found) > limit_bytes:
            raise Ended(f"makes a text of more than {len(found)} bytes")
        if found.endswith(b"\n"):
            return bytes(found)


def _read(line: bytes, keys: Collection[str]) -> dict[str, str]:
    """A reply: a JSON object with one of these keys, and a text."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        reply = None
    if isinstance(reply, dict) and len(reply) == 1:
        ((key, text),) = reply.items()
        if key in keys and isinstance(text, str):
            return reply
    raise _Broken(f"answered {shown(line[:200], 160)}")


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process ended that has closed its output."""
    try:
        code: int | None = process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        return "closed its output"
    return how_ended(code)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
