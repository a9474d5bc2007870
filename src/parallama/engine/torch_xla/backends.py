"""Starting a backend's devices, once a process. Reads and writes environment variables.

A process has one backend and one device count for its whole life: torch-xla reads both when it is
first used and never again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import BackendError, FitError, UsageError, cause, lines
from ...host import usable_cores
from ..devices import discovery, plugins, tenstorrent, versions
from ..devices.plugins import OptionValue
from ..interface import Backend
from . import flags
from .lean_import import import_torch_xla, runtime_runs
from .xla_output import hide_warnings, keep_programs

MOST_CPU_DEVICES = 256
# Not only once a backend starts: with accelerate installed, transformers imports torch_xla.
hide_warnings()


@dataclass(frozen=True, kw_only=True)
class XlaBackend(Backend):
    """The backend this process runs on.

    Attributes:
        weights_first: products with weights are best written `(W @ x.T).T`, see `linear_products`;
            elsewhere XLA picks layouts itself.
        onednn: products can be given to oneDNN (`ops.onednn_product`).
        one_core_each: there are no more cores than devices, so that nothing is lost where a
            device's product takes one.
    """

    weights_first: bool
    onednn: bool = False
    one_core_each: bool = False


_started: XlaBackend | None = None


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
        name: a name of `discovery.NAMES`, the path of a PJRT plugin, or the name of an installed
            one.
        devices: virtual devices to make on `cpu` (1 if None); on others it must be what the machine
            has.
        options: for the client that a plugin makes (`client_create_options`).
        grid: data x model, which old releases of Tenstorrent's plugin read from the environment.
        keep_hlo: keep what XLA writes about its programs (`xla_output`).

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
        _check_running(_started, name, devices, options)
        if keep_hlo:
            keep_programs()  # says that it is too late, unless it was told before
        return _started
    versions.check_torch_xla()
    if keep_hlo:
        keep_programs()
    if not runtime_runs():
        # torch-xla leaves it behind in a process with several devices. Whoever is started from
        # there, as a command from a notebook, inherits it, and fails with one device.
        os.environ.pop("XLA_USE_SPMD", None)
    if name == "cpu":
        _set_flags("cpu")
        _started = _start_cpu(1 if devices is None else devices)
    else:
        _started = _start_plugin(discovery.find(name), devices, options, grid)
    return _started


def _check_running(
    running: XlaBackend, name: str, devices: int | None, options: dict[str, OptionValue]
) -> None:
    """Make sure that the backend that runs is the one that is asked for.

    Raises:
        FitError: it isn't.
    """
    if plugins.is_path(name):
        library: Path | None = Path(name).expanduser()
        called = plugins.name_of(Path(name))
    else:
        library = None if running.library is None else discovery.library_of(name)
        called = name
    other_file = library is not None and not _is_file_of(running, library)
    same = not other_file if plugins.is_path(name) else name == running.name
    if other_file and called == running.name:
        difference = f"its plugin is {str(running.library)!r}, not {str(library)!r}"
    elif dict(running.options) != options:
        difference = "with other backend options"
    elif not same or devices not in (None, running.devices):
        difference = "torch-xla fixes the device count once per process"
    else:
        return
    raise FitError(
        lines(
            f"this process already runs {running.devices} {running.name} device(s), not "
            f"{devices or 'any'} {called} device(s)",
            difference,
            "use another process, or a mesh of as many devices",
        )
    )


def _is_file_of(running: XlaBackend, library: Path) -> bool:
    """Whether a plugin file is the running backend's, by this path or another."""
    try:
        return running.library is not None and library.samefile(running.library)
    except OSError:
        return False


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
    if runtime_runs() and any(os.environ.get(key) != value for key, value in variables.items()):
        settings = " ".join(f"{key}={value}" for key, value in variables.items())
        raise FitError(
            lines(
                "torch_xla's runtime was started before parallama could ask for "
                f"{devices} CPU device(s)",
                f"import parallama and load the model first, or set {settings} yourself",
            )
        )
    os.environ |= variables
    # Importing torch_xla would load every installed plugin. Some print, or set variables that are
    # for their devices only.
    os.environ.setdefault("XLA_REGISTER_INSTALLED_PLUGINS", "0")
    import_torch_xla()
    _use_spmd(devices)
    return XlaBackend(
        name="cpu",
        devices=devices,
        weights_first=True,
        onednn=versions.onednn_fusions(),
        one_core_each=usable_cores() <= devices,
    )


def _start_plugin(
    found: discovery.Found,
    devices: int | None,
    options: dict[str, OptionValue],
    grid: tuple[int, ...] | None,
) -> XlaBackend:
    if runtime_runs():
        raise FitError(
            lines(
                "torch_xla's runtime was started before parallama could ask for backend "
                f"{found.name!r}",
                "import parallama and load the model first",
            )
        )
    _set_flags(found.name)
    os.environ["PJRT_DEVICE"] = found.device
    os.environ.setdefault("XLA_REGISTER_INSTALLED_PLUGINS", "0")
    if found.name == "tt":
        for variable, value in tenstorrent.variables_for(
            found.library, devices, grid, versions.partitioner()
        ).items():
            os.environ.setdefault(variable, value)
    # Plugins may print; standard output is for our results.
    with redirect_stdout(sys.stderr):
        import_torch_xla()
        _register(found, options)
        present = _device_count(found)
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


def _device_count(found: discovery.Found) -> int:
    """Make the plugin's client, and count its devices."""
    import torch_xla.runtime as xr

    try:
        return int(xr.global_runtime_device_count())
    except RuntimeError as error:
        raise BackendError(
            lines(
                f"backend {found.name!r} does not start: {cause(error)}",
                f"plugin: {found.library} (PJRT API {found.api})",
            )
        ) from None


def _register(found: discovery.Found, options: dict[str, OptionValue]) -> None:
    """Tell torch_xla of a plugin: its own class for it where there is one, our file and options."""
    import torch_xla
    from torch_xla.experimental import plugins as registry

    entry = discovery.entry_class("tpu") if found.name == "tpu" else found.entry
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
    """Partition programs over several devices.

    A single one runs better without, and on Tenstorrent's only without.
    """
    import torch_xla.runtime as xr

    if devices > 1:
        xr.use_spmd()
