"""Where the cores' time goes while an engine computes, by the samples of Linux's `perf`. Pure.

XLA's own profiler has only the start of a product that several threads share; samples show the
kernel itself. oneDNN, which XLA:CPU multiplies with, names its kernels for perf if asked.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal, get_args

from ..errors import RunError, UsageError, lines, shown
from ..isolated_process import how_ended
from .keeper import family
from .rows import Profile

Kind = Literal[
    "products", "packing", "compiled", "torch", "collectives", "system", "waiting", "other"
]
"""What a core does.

products: a library's matrix products. packing: copying their operands for them. compiled: XLA's own
code: loops, attention's softmax, products of one row. torch: its own loops. collectives: sums over
devices. system: mostly clearing memory. waiting: for other threads. other: anything else.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)
HERTZ = 1999
_ATTACH_S = 1.0  # until perf samples, or has given up
_WRITE_S = 60.0
_SYMBOLS: tuple[tuple[str, Kind], ...] = (
    (r"gemm_pack|_scopy_|_dcopy_|omp_parallel_[ab]copy|gblock_by_", "packing"),
    (r"_gemm_f32_|_gemm_kernel|gebp_kernel|gemm_kernel|gemv|brgemm|mkl_blas_\w*gemm", "products"),
    (r"AllReduce|ReduceScatter|AllGather|CollectivePermute|Rendezvous|gloo", "collectives"),
    (r"RunQueue|MaybeGetTask|NonEmptyQueueIndex|WaitForWork|EventCount|sched_yield", "waiting"),
)
_LINE = re.compile(
    r"\s*(?P<samples>\d+)\s+(?P<object>\[JIT\] tid \d+|\S+)\s+\[\S\]\s+(?P<symbol>.*\S)"
)


def check_perf() -> None:
    """Raise `UsageError` where there is no perf: before anything is measured."""
    if shutil.which("perf") is None:
        raise UsageError(
            lines(
                "--profile needs Linux's perf",
                "expected it on the PATH; on Debian run: apt-get install linux-perf",
            )
        )


def kernel_names(pid: int) -> Path:
    """Where a process names its kernels that was told to, by `environment.name_kernels`."""
    return Path(f"/tmp/perf-{pid}.map")


def kind_of(object_: str, symbol: str) -> Kind:
    """What code does.

    Args:
        object_: the file it is of, as perf prints it; `[JIT] ...` for code made at run time.
        symbol: its function's name, or its address where it has none.
    """
    if object_.startswith("[k") or object_.startswith("[guest.k"):
        return "system"
    for pattern, kind in _SYMBOLS:
        if re.search(pattern, symbol):
            return kind
    if object_.startswith(("[JIT]", "[unknown]", "[anon]", "perf-")):
        return "compiled"
    if "gomp" in object_ or "libiomp" in object_:
        return "waiting"
    return "torch" if "libtorch" in object_ or "libmkl" in object_ else "other"


def count(report: str) -> Counter[Kind]:
    """Samples of each kind, from what `perf report` prints of samples, objects and symbols."""
    counted: Counter[Kind] = Counter()
    for line in report.splitlines():
        if found := _LINE.match(line):
            counted[kind_of(found["object"], found["symbol"])] += int(found["samples"])
    return counted


class Recording:
    """Of one stretch of an engine's work.

    Attributes:
        counted: samples of each kind; there once the stretch is over.
    """

    def __init__(self) -> None:
        self.counted: Counter[Kind] = Counter()

    def profile(self, seconds: Sequence[float], cores: int) -> Profile:
        """What a pass takes, in the mean.

        Args:
            seconds: of each prefill or step in the stretch; what is between them is not the
                engine's.
            cores: that the engine may use.
        """
        passes = len(seconds)
        took = sum(seconds)
        each: dict[str, float] = {kind: 1e3 * self.counted[kind] / HERTZ / passes for kind in KINDS}
        idle = max(0.0, 1e3 * took * cores / passes - sum(each.values()))
        return Profile(
            samples=self.counted.total(),
            ms_per_pass=1e3 * took / passes,
            core_ms_per_pass={**each, "idle": idle},
        )


@contextlib.contextmanager
def recording(pid: int) -> Iterator[Recording]:
    """Sample a process and all that it started, from when this is entered until it is left.

    Raises:
        RunError: perf can't; the message says why.
    """
    taken = Recording()
    with tempfile.TemporaryDirectory(prefix="parallama-perf-") as folder:
        data = Path(folder) / "data"
        processes = ",".join(map(str, family(pid)))
        command = ["perf", "record", "--no-buildid-cache", "--event", "cpu-clock"]
        command += ["--freq", str(HERTZ), "--pid", processes, "--output", str(data)]
        with (Path(folder) / "log").open("w+") as log, _ended(command, log) as perf:
            with contextlib.suppress(subprocess.TimeoutExpired):
                perf.wait(_ATTACH_S)
            if perf.returncode is not None:
                log.seek(0)
                said = " ".join(log.read().split())[:200]
                raise RunError(
                    lines(f"perf cannot record: {said}", "see /proc/sys/kernel/perf_event_paranoid")
                )
            yield taken
        taken.counted = count(_report(data))


@contextlib.contextmanager
def _ended(command: list[str], log: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """perf, which writes what it has when it is interrupted, and is over when this is left."""
    perf = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield perf
    finally:
        perf.send_signal(signal.SIGINT)
        try:
            perf.wait(_WRITE_S)
        except subprocess.TimeoutExpired:
            raise RunError(lines(f"perf did not end within {_WRITE_S:.0f} s")) from None
        finally:
            perf.kill()
            perf.wait()


def _report(data: Path) -> str:
    command = ["perf", "report", "--stdio", "--quiet", "--no-children", "--no-demangle"]
    command += ["--percent-limit", "0", "--fields", "sample,dso,sym", "--input", str(data)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if ended.returncode != 0 or not count(ended.stdout):
        said = shown(" ".join((ended.stderr or ended.stdout).split()), 200)
        raise RunError(
            lines(
                f"perf report gave no samples: it {how_ended(ended.returncode)} and said {said}",
                "expected lines of samples, object and symbol",
            )
        )
    return ended.stdout
