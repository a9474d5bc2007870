"""Backends: which devices there are and how to start them. The only module that reads or writes environment variables.

A process has one backend and one device count for its whole life: torch-xla reads both when it is first used and never again.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import flags
from .errors import BackendError, FitError, lines

NAMES = ("cpu", "tpu")
TORCH_XLA = "2.9"
MOST_CPU_DEVICES = 256
_M_MMAP_THRESHOLD = -3
# XLA warns about every program that GSPMD partitions; errors still show. It reads this when torch_xla is imported, and with accelerate installed
# transformers imports torch_xla: so it is set before either.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The backend this process runs on.

    Attributes:
        name: `cpu` or `tpu`.
        devices: devices of this process.
        weights_first: products with weights are best written `(W @ x.T).T` (see `products`); elsewhere XLA picks layouts itself.
    """

    name: str
    devices: int
    weights_first: bool


_started: Backend | None = None


def start(name: str = "cpu", devices: int | None = None) -> Backend:
    """Start a backend with so many devices, or return the one that runs if it is the same.

    Args:
        name: a name of `NAMES`.
        devices: virtual devices to make on `cpu` (1 if None); on others it must be what the machine has.

    Raises:
        BackendError: unknown, not installed, or of a version that doesn't fit.
        FitError: this process already runs another backend or device count.
    """
    global _started
    if name not in NAMES:
        raise BackendError(lines(f"backend {name!r} is unknown", f"expected one of {', '.join(NAMES)}"))
    if _started is not None:
        if _started.name != name or devices not in (None, _started.devices):
            raise FitError(
                lines(
                    f"this process already runs {_started.devices} {_started.name} device(s), not {devices or 'any'} {name} device(s)",
                    "torch-xla fixes the device count once per process",
                    "use another process, or a mesh of as many devices",
                )
            )
        return _started
    _check_versions()
    variable = flags.VARIABLES[name]
    os.environ[variable] = flags.with_defaults(name, os.environ.get(variable, ""))
    _started = _start_cpu(1 if devices is None else devices) if name == "cpu" else _start_tpu(devices)
    return _started


def expect_none() -> None:
    """For a process that starts no backend: torch_xla, which transformers may import, then doesn't have to guess one and say so."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")


def _check_versions() -> None:
    try:
        version = importlib.metadata.version("torch_xla")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(
            lines("torch_xla is not installed", f"expected torch_xla {TORCH_XLA}.x", "run: pip install torch_xla==2.9.0")
        ) from None
    if not version.startswith(TORCH_XLA + "."):
        raise BackendError(lines(f"torch_xla {version} is installed", f"expected {TORCH_XLA}.x, the release this package is made for"))


def _start_cpu(devices: int) -> Backend:
    if not 1 <= devices <= MOST_CPU_DEVICES:
        raise FitError(lines(f"{devices} virtual CPU devices", f"expected 1 to {MOST_CPU_DEVICES}"))
    if _runtime_runs():
        wanted = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
        if any(os.environ.get(key) != value for key, value in wanted.items()):
            raise FitError(
                lines(
                    f"torch_xla's runtime was started before parallama could ask for {devices} CPU device(s)",
                    "import parallama and load the model first, or set PJRT_DEVICE=CPU and CPU_NUM_DEVICES yourself",
                )
            )
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ["CPU_NUM_DEVICES"] = str(devices)
    _use_spmd(devices)
    return Backend(name="cpu", devices=devices, weights_first=True)


def _runtime_runs() -> bool:
    """Whether torch-xla has made its client, which reads the environment. Importing it alone doesn't (and accelerate imports it)."""
    if "torch_xla" not in sys.modules:
        return False
    import torch_xla

    return bool(torch_xla._XLAC._xla_runtime_is_initialized())


def _start_tpu(devices: int | None) -> Backend:
    if importlib.util.find_spec("libtpu") is None:
        raise BackendError(
            lines("backend 'tpu' is not available: libtpu is not installed", "on a TPU machine run: pip install 'torch_xla[tpu]==2.9.0'")
        )
    os.environ["PJRT_DEVICE"] = "TPU"
    import torch_xla.runtime as xr

    try:
        present = xr.global_runtime_device_count()
    except RuntimeError as error:
        raise BackendError(lines(f"backend 'tpu' does not start: {str(error).splitlines()[0]}")) from None
    if devices not in (None, present):
        raise FitError(lines(f"{devices} devices asked for, this TPU slice has {present}", "expected a mesh that covers all of them"))
    _use_spmd(present)
    return Backend(name="tpu", devices=present, weights_first=False)


def _use_spmd(devices: int) -> None:
    """Partition programs over several devices; a single one runs better without."""
    import torch_xla.runtime as xr

    if devices > 1:
        xr.use_spmd()


@contextmanager
def lean_host_memory() -> Iterator[None]:
    """While loading: give every freed tensor's memory back to the system at once.

    glibc learns from freed blocks to keep ever larger ones (up to 32 MB) for itself, and a loader that frees a tensor for each that it makes then peaks at almost
    twice the model. Afterwards the threshold stays at that maximum, which is where running programs' buffers belong.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
