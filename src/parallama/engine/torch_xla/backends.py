"""Backends: which devices there are and how to start them. Reads and writes environment variables.

A process has one backend and one device count for its whole life: torch-xla reads both when it is first used and never again.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from ...errors import BackendError, FitError, UsageError, cause, lines
from ...host import usable_cores
from ..devices import plugins, versions
from ..devices.discovery import Found, entry_class, find
from ..devices.plugins import OptionValue
from ..interface import Backend
from . import flags

MOST_CPU_DEVICES = 256
# XLA warns about every program that GSPMD partitions; errors still show. It reads this when torch_xla is imported, and with accelerate installed
# transformers imports torch_xla: so it is set before either.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@dataclass(frozen=True, kw_only=True)
class XlaBackend(Backend):
    """The backend this process runs on.

    Attributes:
        weights_first: products with weights are best written `(W @ x.T).T` (see `products`);
            elsewhere XLA picks layouts itself.
        onednn: products can be handed to oneDNN (`ops.onednn_product`).
        one_core_each: there are no more cores than devices, so that nothing is lost where a
            device's product takes one.
    """

    weights_first: bool
    onednn: bool = False
    one_core_each: bool = False


_started: XlaBackend | None = None
_hlo: tempfile.TemporaryDirectory[str] | None = None


def start(
    name: str = "cpu",
    devices: int | None = None,
    options: Mapping[str, OptionValue] | None = None,
    *,
    grid: tuple[int, ...] | None = None,
    keep_hlo: bool = False,
) -> XlaBackend:
    """Start a backend with so many devices, or return the one that runs if it is the same.

    Args:
        name: a name of `NAMES`, the path of a PJRT plugin, or the name of an installed one.
        devices: virtual devices to make on `cpu` (1 if None); on others it must be what the machine has.
        options: for the client that a plugin makes (`client_create_options`).
        keep_hlo: keep what XLA writes about its programs (`written_hlo`).
        grid: data x model, which old releases of Tenstorrent's plugin read from the environment.

    Raises:
        BackendError: unknown, not installed, of a version that doesn't fit, or it doesn't start.
        FitError: this process already runs another backend or device count.
        UsageError: options on `cpu`, whose client takes none.
    """
    global _started
    options = dict(options or {})
    if name == "cpu" and options:
        raise UsageError(
            lines(
                f"backend option {next(iter(options))!r} was given",
                "expected none: the cpu backend's client takes no options",
            )
        )
    if _started is not None:
        called = plugins.name_of(Path(name)) if plugins.is_path(name) else name
        if (
            _started.name != called
            or devices not in (None, _started.devices)
            or dict(_started.options) != options
        ):
            raise FitError(
                lines(
                    f"this process already runs {_started.devices} {_started.name} device(s), not {devices or 'any'} {called} device(s)",
                    "torch-xla fixes the device count once per process"
                    if dict(_started.options) == options
                    else "with other backend options",
                    "use another process, or a mesh of as many devices",
                )
            )
        if keep_hlo and _hlo is None:
            _keep_hlo()  # says that it is too late
        return _started
    versions.check_torch_xla()
    if keep_hlo:
        _keep_hlo()
    if name == "cpu":
        _set_flags("cpu")
        _started = _start_cpu(1 if devices is None else devices)
    else:
        _started = _start_plugin(find(name), devices, options, grid)
    return _started


def written_hlo() -> set[Path] | None:
    """The files about programs that XLA has written so far; None where `start` was not to keep any."""
    return None if _hlo is None else set(Path(_hlo.name).iterdir())


def _keep_hlo() -> None:
    """Have XLA write every program as text, with the names of the modules that its parts come from.

    Raises:
        FitError: torch-xla's runtime is running; it has read its flags already.
    """
    global _hlo
    if _runtime_runs():
        raise FitError(
            lines(
                "torch_xla's runtime was started before its programs could be asked for",
                "use a process of its own",
            )
        )
    _hlo = tempfile.TemporaryDirectory(prefix="parallama-hlo-")
    os.environ["XLA_IR_DEBUG"] = os.environ["XLA_HLO_DEBUG"] = "1"
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_dump_to={_hlo.name} --xla_dump_hlo_as_text".lstrip()
    if "torch_xla" in sys.modules:  # which has read XLA_IR_DEBUG when it was imported
        import torch_xla

        torch_xla._XLAC._set_ir_debug(True)


def _set_flags(name: str) -> None:
    if name in flags.VARIABLES:
        variable = flags.VARIABLES[name]
        os.environ[variable] = flags.with_defaults(name, os.environ.get(variable, ""))


def _start_cpu(devices: int) -> XlaBackend:
    if not 1 <= devices <= MOST_CPU_DEVICES:
        raise FitError(lines(f"{devices} virtual CPU devices", f"expected 1 to {MOST_CPU_DEVICES}"))
    variables = {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(devices),
        **flags.cpu_threads(devices, usable_cores(), os.environ),
    }
    if _runtime_runs() and any(os.environ.get(key) != value for key, value in variables.items()):
        raise FitError(
            lines(
                f"torch_xla's runtime was started before parallama could ask for {devices} CPU device(s)",
                f"import parallama and load the model first, or set {' '.join(f'{key}={value}' for key, value in variables.items())} yourself",
            )
        )
    os.environ |= variables
    # Importing torch_xla would load every installed plugin, and some print, or set variables that are for their devices only.
    os.environ.setdefault("XLA_REGISTER_INSTALLED_PLUGINS", "0")
    _import_torch_xla()
    _use_spmd(devices)
    return XlaBackend(
        name="cpu",
        devices=devices,
        weights_first=True,
        onednn=versions.onednn_fusions(),
        one_core_each=usable_cores() <= devices,
    )


def _runtime_runs() -> bool:
    """Whether torch-xla has made its client, which reads the environment. Importing it alone doesn't (and accelerate imports it)."""
    if "torch_xla" not in sys.modules:
        return False
    import torch_xla

    return bool(torch_xla._XLAC._xla_runtime_is_initialized())


def _import_torch_xla() -> None:
    """Import torch_xla without two of its modules, unless it is imported already; whoever imports them later gets them.

    They need torch's own compiler (functorch, torch._inductor), which takes longer to import than all the rest. One exports programs as StableHLO: torch_xla takes functions
    of it, which import it now when they are called. The other replaces torch's GRU, which stays.
    """
    if "torch_xla" in sys.modules:
        return
    import torch

    gru = ModuleType("torch_xla.experimental.gru")
    vars(gru)["GRU"] = torch.nn.GRU
    stand_ins = {each.__name__: each for each in (gru, _ImportedLater("torch_xla.stablehlo"))}
    sys.modules.update(stand_ins)
    try:
        import torch_xla  # noqa: F401
    finally:
        for name in stand_ins:
            del sys.modules[name]


class _ImportedLater(ModuleType):
    """A stand-in for a module, whose functions import it when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def imported_later(*args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return imported_later


def _start_plugin(
    found: Found, devices: int | None, options: dict[str, OptionValue], grid: tuple[int, ...] | None
) -> XlaBackend:
    if _runtime_runs():
        raise FitError(
            lines(
                f"torch_xla's runtime was started before parallama could ask for backend {found.name!r}",
                "import parallama and load the model first",
            )
        )
    _set_flags(found.name)
    os.environ["PJRT_DEVICE"] = found.device
    os.environ.setdefault("XLA_REGISTER_INSTALLED_PLUGINS", "0")
    if found.name == "tt":
        for variable, value in plugins.tt_environment(
            found.library, devices, grid, versions.partitioner()
        ).items():
            os.environ.setdefault(variable, value)
    # Plugins may print; standard output is for our results.
    with redirect_stdout(sys.stderr):
        _import_torch_xla()
        _register(found, options)
        import torch_xla.runtime as xr

        try:
            present = xr.global_runtime_device_count()
        except RuntimeError as error:
            raise BackendError(
                lines(
                    f"backend {found.name!r} does not start: {cause(error)}",
                    f"plugin: {found.library} (PJRT API {found.api})",
                )
            ) from None
    if devices not in (None, present):
        raise FitError(
            lines(
                f"{devices} devices asked for, backend {found.name!r} has {present}",
                "expected a mesh that covers all of them",
            )
        )
    _use_spmd(present)
    return XlaBackend(
        name=found.name,
        devices=present,
        weights_first=False,
        library=found.library,
        api=found.api,
        options=MappingProxyType(options),
    )


def _register(found: Found, options: dict[str, OptionValue]) -> None:
    """Tell torch_xla of a plugin: its own class for it where there is one, with our file and options."""
    import torch_xla
    from torch_xla.experimental import plugins as registry

    entry = found.entry
    if found.name == "tpu":
        entry = entry_class("tpu")
    base: Any = registry.DevicePlugin if entry is None else entry

    class Plugin(base):  # type: ignore[misc]
        def library_path(self) -> str:
            return str(found.library)

        def client_create_options(self) -> dict[str, Any]:
            return {**super().client_create_options(), **options}

    if found.name == "tt":
        # As Tenstorrent's own class does: numbers in a program are constants, not buffers.
        torch_xla._XLAC._set_xla_all_numbers_special_scalars(True)
    registry.use_dynamic_plugins()
    registry.register_plugin(found.device, Plugin())


def device_names() -> list[str]:
    """What the running backend calls its devices."""
    import torch_xla.runtime as xr

    return [
        str(attributes.get("name", number))
        for number, attributes in enumerate(xr.global_runtime_device_attributes())
    ]


def _use_spmd(devices: int) -> None:
    """Partition programs over several devices; a single one runs better without, and on Tenstorrent's only without."""
    import torch_xla.runtime as xr

    if devices > 1:
        xr.use_spmd()
