"""Commands, scripts and functions in children of one process that has imported everything.

Importing torch, torch_xla and transformers takes seconds, forking a process that has done so takes
milliseconds. That process has no device and computes nothing, so a child may start any devices.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import pkgutil
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

HERE = Path(__file__).parent
LIMIT_S = 300
MESSAGE_BYTES = 150_000
OF_DEVICES = ("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_", "LIBTPU_", "NPROC")
READ_ON_IMPORT = ("HF_", "LD_", "MKL_", "OMP_", "PYTHON", "TF_CPP_", "TRANSFORMERS_", "XLA_")
"""Variables that come too late in a forked process: what needs them takes a process of its own."""


@dataclass(frozen=True)
class Done:
    """How a process ended.

    Attributes:
        code: its exit code, negative for the signal that ended it.
        out: its standard output.
        err: its standard error.
    """

    code: int
    out: str
    err: str


def command(
    arguments: list[str],
    *,
    stdin: str = "",
    cwd: Path | str | None = None,
    env: Mapping[str, str | None] | None = None,
    limit_s: float = LIMIT_S,
    optimize: bool = True,
) -> Done:
    """Run `parallama` with these arguments.

    Args:
        env: differences to this process's environment; None takes a variable out.
        limit_s: then it is killed.
        optimize: False compiles in half the time, to slower programs of the same HLO.

    Raises:
        TimeoutError: it took longer.
    """
    told = {"arguments": arguments}
    return _finish("forks:_command", told, stdin, cwd, env, limit_s, optimize)


def commands(
    *cases: list[str],
    stdin: Mapping[int, str] | None = None,
    cwd: Path | str | None = None,
    limit_s: float = LIMIT_S,
    optimize: bool = True,
) -> list[Done]:
    """Run `parallama` several times in one process, which has to have the same devices in each.

    Args:
        stdin: the standard input of some of the runs, by number.
    """
    told = {"cases": cases, "inputs": dict(stdin or {})}
    done = _finish("forks:_commands", told, "", cwd, None, limit_s, optimize)
    assert done.code == 0, done.err[-3000:]
    return [Done(*each) for each in json.loads(done.out)]


def script(
    text: str,
    *arguments: str,
    stdin: str = "",
    cwd: Path | str | None = None,
    env: Mapping[str, str | None] | None = None,
    limit_s: float = LIMIT_S,
    optimize: bool = True,
) -> Done:
    """Run a Python program with these arguments, as `python -c` does."""
    told = {"text": text, "arguments": arguments}
    return _finish("forks:_script", told, stdin, cwd, env, limit_s, optimize)


def call(
    target: str, *, log: Path, limit_s: float = LIMIT_S, optimize: bool = True, **arguments: Any
) -> int:
    """Run `module:function`, which gives back its exit code; what it writes goes into `log`."""
    with log.open("wb") as stream:
        child = Child(target, arguments, out=stream, err=stream, optimize=optimize)
    return child.wait(limit_s)


class Child:
    """A forked process that runs `module:function`. Its exit code is what that gives back, or 0."""

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        out: BinaryIO,
        err: BinaryIO,
        stdin: BinaryIO | None = None,
        cwd: Path | str | None = None,
        env: Mapping[str, str | None] | None = None,
        pipe: int | None = None,
        optimize: bool = True,
    ) -> None:
        """Start it.

        Args:
            pipe: a descriptor that the function gets as its first argument.
        """
        late = [name for name in env or {} if name.startswith(READ_ON_IMPORT)]
        assert not late, f"{late} must be set before imports: use a process of its own"
        job = (target, dict(arguments), str(cwd or Path.cwd()), dict(env or {}), optimize)
        with Path(os.devnull).open("rb") as nothing:
            streams = [stdin or nothing, out, err]
            files = [stream.fileno() for stream in streams] + ([] if pipe is None else [pipe])
            self.pid = _server().start(job, files)

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return _server().ended(self.pid, 0)

    def wait(self, limit_s: float) -> int:
        """Its exit code.

        Raises:
            TimeoutError: it did not end in time, and was killed.
        """
        code = _server().ended(self.pid, limit_s)
        if code is None:
            self.kill()
            raise TimeoutError(f"a process did not end in {limit_s} s")
        return code

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _server().ended(self.pid, 60)


def _finish(
    target: str,
    told: Mapping[str, Any],
    stdin: str,
    cwd: Path | str | None,
    env: Mapping[str, str | None] | None,
    limit_s: float,
    optimize: bool,
) -> Done:
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin.encode())
        given.seek(0)
        child = Child(
            target, told, out=out, err=err, stdin=given, cwd=cwd, env=env, optimize=optimize
        )
        try:
            code: int | None = child.wait(limit_s)
        except TimeoutError:
            code = None
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    if code is None:
        raise TimeoutError(
            f"{told} did not end in {limit_s} s\n{texts[0][-2000:]}{texts[1][-2000:]}"
        )
    return Done(code, *texts)


def environment() -> dict[str, str]:
    """This process's variables, but for those about devices; and no hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OF_DEVICES)}
    return kept | {"HF_HUB_OFFLINE": "1"}


# -- this side of the server


@functools.cache
def _server() -> _Server:
    return _Server()


class _Server:
    """The process that forks, as the tests' process sees it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - for life
        self._ended: dict[int, int] = {}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment(),
                cwd=HERE,
            )
        atexit.register(self.stop)

    def start(self, job: tuple[Any, ...], files: list[int]) -> int:
        message = pickle.dumps(job)
        assert len(message) < MESSAGE_BYTES, "write it into a file"
        socket.send_fds(self._socket, [message], files)
        while True:
            what, pid, code = self._receive()
            if what == "started":
                return pid
            self._ended[pid] = code

    def ended(self, pid: int, limit_s: float) -> int | None:
        """The exit code of a child, None if it still runs after so many seconds."""
        until = time.monotonic() + limit_s
        while pid not in self._ended:
            left = max(until - time.monotonic(), 0)
            if not select.select([self._socket], [], [], left)[0]:
                return None
            _, other, code = self._receive()
            self._ended[other] = code
        return self._ended[pid]

    def _receive(self) -> tuple[str, int, int]:
        message = self._socket.recv(MESSAGE_BYTES)
        if not message:
            self._log.seek(0)
            raise RuntimeError(f"the fork server ended\n{self._log.read().decode()[-3000:]}")
        return pickle.loads(message)

    def stop(self) -> None:
        self._socket.close()
        self._process.wait(60)
        self._log.close()


# -- the server itself


def _serve(descriptor: int) -> None:
    """Fork a child for every job until the tests' process is gone."""
    _import_everything()
    with (
        socket.socket(fileno=descriptor) as tests,
        selectors.DefaultSelector() as events,
    ):
        events.register(tests, selectors.EVENT_READ)
        children: dict[int, int] = {}
        while True:
            for event, _ in events.select():
                if event.fileobj is tests:
                    message, files, _, _ = socket.recv_fds(tests, MESSAGE_BYTES, 4)
                    if not message:
                        _end(children.values())
                        return
                    child = os.fork()
                    if child == 0:
                        for ours in (tests.fileno(), events.fileno(), *children):
                            os.close(ours)
                        _live(pickle.loads(message), files)
                    for file in files:
                        os.close(file)
                    watch = os.pidfd_open(child)
                    children[watch] = child
                    events.register(watch, selectors.EVENT_READ)
                    tests.send(pickle.dumps(("started", child, 0)))
                else:
                    watch = event.fd
                    events.unregister(watch)
                    os.close(watch)
                    child = children.pop(watch)
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    tests.send(pickle.dumps(("ended", child, code)))


def _end(children: Any) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def _import_everything() -> None:
    """What commands, workers and cases import; no device, no computation, no thread of torch's."""
    import gc

    from parallama.engine.torch_xla import backends, lean_import

    with _variables({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1"}):
        os.environ["XLA_REGISTER_INSTALLED_PLUGINS"] = "0"
        backends._set_flags("cpu")
        lean_import.import_torch_xla()
        import transformers

        for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM"):
            getattr(transformers, name)
        import parallama

        for module in pkgutil.walk_packages(parallama.__path__, "parallama."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # a collection would write to every object, and so copy it into each child


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    os.environ |= values
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)


def _live(job: tuple[Any, ...], files: list[int]) -> None:
    """A child's life, from the fork to its exit."""
    code = 1
    try:
        target, arguments, folder, changes, optimize = job
        _settle(files[:3], folder, changes)
        if not optimize:
            os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
        module, _, function = target.partition(":")
        code = _code(
            functools.partial(
                getattr(importlib.import_module(module), function), *files[3:], **arguments
            )
        )
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the command may have closed it
                stream.flush()
        os._exit(code)  # the interpreter would first free all that was imported


def _settle(files: list[int], folder: str, changes: dict[str, str | None]) -> None:
    """Be a process of its own: session, signals, standard streams, folder, environment."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    os.chdir(folder)
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _code(run: Any) -> int:
    """The exit code that Python would end with."""
    try:
        returned = run()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
            return 1
        return leaving.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return returned if isinstance(returned, int) else 0


def _command(arguments: list[str]) -> None:
    from parallama import __main__

    _as_installed(arguments)
    __main__.main()


def _commands(cases: tuple[list[str], ...], inputs: dict[int, str]) -> None:
    from parallama import __main__

    _as_installed([])
    ended = []
    for number, arguments in enumerate(cases):
        sys.stdin = io.StringIO(inputs.get(number, ""))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = __main__.run(arguments)
        ended.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(ended))


def _as_installed(arguments: list[str]) -> None:
    """As a command starts; it imports nothing from the tests, and takes no deprecated way."""
    sys.path.remove(str(HERE))
    sys.argv = ["parallama", *arguments]
    warnings.filterwarnings("error", category=DeprecationWarning, module="parallama")


def _script(text: str, arguments: tuple[str, ...]) -> None:
    sys.path[sys.path.index(str(HERE))] = ""
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(text, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    # Not as `__main__`: the child's functions are found by the module's name.
    import forks

    forks._serve(int(sys.argv[1]))
