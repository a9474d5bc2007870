"""`parallama bench` where it went wrong once: of what it starts nothing is left, however
it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallama.bench import shapes
from parallama.bench.processes import EngineProcess
from parallama.bench.profile import kernel_names

LIMIT_S = 120
MARK = "PARALLAMA_TEST_MARK"
WORKER = "parallama.bench.worker"
MACHINE = {"engine": "machine", "threads": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    shapes.make("tiny", folder)
    return str(folder)


class Marked:
    """Processes by a mark in their environment, which all that they start inherit."""

    def __init__(self) -> None:
        self.value = uuid.uuid4().hex

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {MARK: self.value}

    def alive(self) -> dict[int, str]:
        """Of each the command, or its beginning."""
        mark, found = f"{MARK}={self.value}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode(errors="replace")[:120]
            except OSError:  # it has ended
                continue
        return found

    def gone(self, within_s: float) -> bool:
        """Whether none is left, or will be within so many seconds."""
        return until(lambda: not self.alive(), within_s)


def until(reached: Callable[[], bool], within_s: float) -> bool:
    ends = time.monotonic() + within_s
    while not reached():
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Marked]:
    """What this test starts, here or in a process of its own; ended after it."""
    found = Marked()
    monkeypatch.setenv(MARK, found.value)
    yield found
    for pid in found.alive():
        os.kill(pid, signal.SIGKILL)


def started(marked: Marked, model: str, said: str, *arguments: str) -> subprocess.Popen[str]:
    """A benchmark that has just said that line."""

    def heed() -> None:  # a test in a shell's background ignores SIGINT, and would hand that on
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "parallama", "bench", model, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=marked.environment,
        preexec_fn=heed,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip() == said:
            return process
    raise AssertionError(f"it ended without saying {said!r}")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and the rest of standard error."""
    _, said = process.communicate(timeout=LIMIT_S)
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
@pytest.mark.parametrize("mode", [[], ["--train"]], ids=["inference", "train"])
def test_a_signal_while_an_engine_starts_leaves_no_process_behind(
    marked: Marked, tiny: str, mode: list[str], number: signal.Signals, code: int
) -> None:
    process = started(marked, tiny, "starting parallama 1x1", *mode)
    assert until(lambda: len(marked.alive()) > 2, LIMIT_S), "the engines are there"
    process.send_signal(number)
    said = ended(process)
    assert marked.alive() == {}
    assert said == (code, "")


def test_ctrl_c_while_torchrun_starts_leaves_no_rank_behind(marked: Marked, tiny: str) -> None:
    process = started(
        marked, tiny, "starting hf-tp 1x2", "--mesh", "1x2", "--peers", "hf-tp", "--batch", "1"
    )
    ranks = 2 + 2  # beside the machine's and ours
    assert until(lambda: sum(map(is_worker, marked.alive().values())) >= ranks, LIMIT_S), (
        marked.alive()
    )
    process.send_signal(signal.SIGINT)
    code, _ = ended(process)
    assert (code, marked.alive()) == (130, {})


def test_a_benchmark_that_is_killed_takes_even_hanging_engines_with_it(
    marked: Marked, tiny: str
) -> None:
    process = started(marked, tiny, "starting parallama 1x1")
    assert until(lambda: sum(map(is_worker, marked.alive().values())) == 2, LIMIT_S)
    hang(marked)
    process.kill()
    ended(process)
    assert marked.gone(within_s=20), marked.alive()


def test_ranks_that_hang_end_with_their_engine(marked: Marked, tiny: str) -> None:
    engine = {
        "engine": "hf-tp",
        "model": tiny,
        "mesh": "1x2",
        "devices": 2,
        "dtype": "float32",
        "backend": "cpu",
        "threads": 2,
    }
    running = EngineProcess(engine, processes=2)
    hang(marked)
    running.close()
    assert marked.alive() == {}


def hang(marked: Marked) -> None:
    """Stop every worker where it is."""
    workers = [pid for pid, command in marked.alive().items() if is_worker(command)]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)


def is_worker(command: str) -> bool:
    """Not what starts one, whose arguments name it, too."""
    return command.split()[1:3] in (["-m", WORKER], ["-u", "-m"]) and WORKER in command


DETACHES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
print("detached", flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("alive_s", ["0", "600"], ids=["ended", "running"])
def test_even_a_daemon_of_an_engine_ends_with_it(marked: Marked, alive_s: str) -> None:
    keeper = subprocess.Popen(
        [sys.executable, "-m", "parallama.bench.keeper", sys.executable, "-c", DETACHES, alive_s],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=marked.environment,
    )
    assert keeper.stdout is not None and keeper.stdin is not None
    assert keeper.stdout.readline() == "detached\n"
    if alive_s != "0":
        assert len(marked.alive()) == 3, "the keeper, its command, the daemon"
        keeper.stdin.close()
    keeper.wait(LIMIT_S)
    assert marked.alive() == {}
    keeper.stdout.close()
    keeper.stdin.close()


def test_an_engine_that_is_profiled_and_killed_leaves_no_names_of_kernels(marked: Marked) -> None:
    with pytest.raises(KeyboardInterrupt), EngineProcess(MACHINE | {"profiled": True}):
        ((worker, _),) = [each for each in marked.alive().items() if is_worker(each[1])]
        kernel_names(worker).touch()  # as oneDNN does once it makes a kernel
        hang(marked)
        raise KeyboardInterrupt
    assert not kernel_names(worker).exists()
