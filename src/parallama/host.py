"""The machine that this process runs on: cores, processor features, memory. Pure."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt
_peak_before = 0
FEATURES = (
    *("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "bf16"),
)
"""What of a processor matters for matrix products, as Linux names it."""


@contextmanager
def lean_host_memory() -> Iterator[Callable[[], None]]:
    """While tensors come and go: a freed tensor's memory goes back to the system.

    Left alone, glibc keeps freed blocks of up to 32 MB, and a loader that frees a tensor for each
    that it makes peaks at almost twice the model. Here blocks over 8 MB go back at once. Smaller
    ones are used again, for the system clears each page that it hands out; what is left of them
    goes back at the end.

    Yields:
        A function that gives back what is free now.
    """
    libc = _glibc()
    if libc is None:
        yield lambda: None
        return
    _set_malloc(libc, most_mapped=1 << 16, mapped_from=1 << 23, kept=1 << 17)
    try:
        yield lambda: libc.malloc_trim(0)
    finally:
        _restore(libc)


@contextmanager
def reused_host_memory() -> Iterator[Callable[[], None]]:
    """While many tensors come and few go: every block comes from one heap, and is used again.

    The system clears each page that it hands out, which takes longer than to fill it. What is free
    goes back at the end.

    Yields:
        A function that gives back what is free now.
    """
    libc = _glibc()
    if libc is None:
        yield lambda: None
        return
    _set_malloc(libc, most_mapped=0, kept=1 << 30)
    try:
        yield lambda: libc.malloc_trim(0)
    finally:
        _restore(libc)


def _restore(libc: ctypes.CDLL) -> None:
    """What glibc comes to by itself once blocks of 32 MB have been freed.

    A product's packed blocks of weights are then used again, and the system need not clear them.
    """
    _set_malloc(libc, most_mapped=1 << 16, mapped_from=1 << 25, kept=1 << 26)
    libc.malloc_trim(0)


def _set_malloc(
    libc: ctypes.CDLL, *, most_mapped: int, kept: int, mapped_from: int | None = None
) -> None:
    """Set glibc's thresholds.

    Args:
        most_mapped: blocks that may be mapped by themselves.
        kept: bytes that may be free at the heap's end before they go back.
        mapped_from: bytes from which on a block is mapped by itself.
    """
    libc.mallopt(_M_MMAP_MAX, most_mapped)
    libc.mallopt(_M_TRIM_THRESHOLD, kept)
    if mapped_from is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, mapped_from)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt, libc.malloc_trim  # noqa: B018 - other C libraries don't have them
    except (OSError, AttributeError):
        return None
    return libc


def usable_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    return max(_peak_before, high_water_bytes())


def high_water_bytes() -> int:
    """The most memory this process has held since `restart_high_water`, in bytes."""
    # getrusage also counts what the process held before it became this program.
    held = _status_bytes("VmHWM:")
    if held is not None:
        return held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_high_water() -> None:
    """Count the high water of memory from here on, where the system can (Linux)."""
    global _peak_before
    _peak_before = peak_rss_bytes()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def rss_bytes() -> int:
    """Memory that this process holds now, in bytes; its peak where the system doesn't tell."""
    return _status_bytes("VmRSS:") or peak_rss_bytes()


def _status_bytes(field: str) -> int | None:
    for line in _lines(Path("/proc/self/status")):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def memory_bytes() -> tuple[int, int] | None:
    """Bytes of memory that the machine has, and that are available now.

    None where the system doesn't tell.
    """
    found: dict[str, int] = {}
    for line in _lines(Path("/proc/meminfo")):
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            found[name] = int(rest.split()[0]) * 1024
    return (found["MemTotal"], found["MemAvailable"]) if len(found) == 2 else None


def available_bytes(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this process can still take, of the machine's or its container's.

    None where the system doesn't tell.

    Args:
        groups: where Linux says what a container may take.
    """
    machine = memory_bytes()
    left = [] if machine is None else [machine[1]]
    for folder, most, now in (
        (groups, "memory.max", "memory.current"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, held = (" ".join(_lines(folder / name)) for name in (most, now))
        if limit.isdigit() and held.isdigit():
            # Pages of files are given back when they are needed.
            pairs = (line.partition(" ") for line in _lines(folder / "memory.stat"))
            files = [size for name, _, size in pairs if name in ("inactive_file", "active_file")]
            left.append(int(limit) - int(held) + sum(map(int, files)))
    return max(0, min(left)) if left else None


def processor() -> tuple[str, list[str]]:
    """The processor's name, and which of `FEATURES` it has."""
    name = platform.processor() or platform.machine()
    features: set[str] = set()
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            features |= set(value.split())
    return name, [feature for feature in FEATURES if feature in features]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
