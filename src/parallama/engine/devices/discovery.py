"""Which plugin a backend's name stands for. Nothing of a plugin is loaded into this process.

What environment variables say counts: torch_xla's for the TPU, JAX's for any plugin.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import BackendError, cause, lines
from . import plugins

NAMES = ("cpu", *plugins.PACKAGES)
ENTRY_POINTS = "torch_xla.plugins"
_HINTS = {
    "tpu": ("libtpu is not installed", "on a TPU machine run: pip install 'torch_xla[tpu]==2.9.0'"),
    "tt": (
        "no plugin of Tenstorrent's is installed",
        "install pjrt-plugin-tt, or give the path of pjrt_plugin_tt.so",
    ),
}
_MEANT = {
    "cpu": "host x86 local virtual none",
    "tpu": "google libtpu xla pjrt jax",
    "tt": "tenstorrent wormhole blackhole ttnn tt-metal tt-xla n150 n300 p150",
    "cuda": "cuda gpu nvidia cuda:0 rocm amd mps metal",
}
"""Backends -> what others call them."""
_NO_CUDA = "there are no GPUs: torch-xla runs on CPU, TPU, Tenstorrent and other PJRT plugins"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A plugin that was found and fits.

    Attributes:
        name: the backend's name.
        device: value of `PJRT_DEVICE`.
        entry: torch_xla's plugin class for it, where a package announces one that is used.
    """

    name: str
    device: str
    library: Path
    api: plugins.ApiVersion
    entry: Any = None


def find(name: str) -> Found:
    """Find a backend's plugin and make sure that it fits.

    Nothing of it is loaded into this process.

    Raises:
        BackendError: there is none, or it doesn't fit.
    """
    entry = None
    if plugins.is_path(name):
        library: Path | None = Path(name).expanduser()
        name = plugins.name_of(Path(name))
    else:
        library = library_of(name)
        if library is None and name not in NAMES:
            entry = entry_class(name)
            library = Path(_entry_library(name, entry)) if entry is not None else None
    if library is None:
        raise missing(name)
    api = plugins.check(library, takes_older_callers=name in plugins.TAKES_OLDER_CALLERS)
    # Any name does for PJRT_DEVICE that torch_xla has no client of its own for. It cuts names at
    # underscores.
    device = name.upper() if name in NAMES or entry is not None else "PLUGIN"
    return Found(name=name, device=device, library=library.absolute(), api=api, entry=entry)


def library_of(name: str) -> Path | None:
    """The plugin file of a backend that an environment variable or a package names, or None.

    torch_xla has a variable for the TPU, JAX one for any plugin.
    """
    named = plugins.named_libraries(os.environ.get("PJRT_NAMES_AND_LIBRARY_PATHS", ""))
    given = os.environ.get("TPU_LIBRARY_PATH") if name == "tpu" else None
    given = given or named.get(name)
    return Path(given).expanduser() if given else plugins.find(name)


def missing(name: str) -> BackendError:
    """The error for a backend that has no plugin."""
    if name in _HINTS:
        return BackendError(
            lines(f"backend {name!r} is not available: {_HINTS[name][0]}", _HINTS[name][1])
        )
    others = ", ".join((*NAMES, *plugins.installed()))
    meant = next((ours for ours, words in _MEANT.items() if name.lower() in words.split()), "")
    return BackendError(
        lines(
            f"backend {name!r} is unknown",
            f"expected one of {others}, or the path of a PJRT plugin (.so)",
            _NO_CUDA if meant == "cuda" else f"did you mean {meant}?" if meant else "",
        )
    )


def announced() -> importlib.metadata.EntryPoints:
    """The plugins that installed packages, torch_xla among them, announce to torch_xla."""
    return importlib.metadata.entry_points(group=ENTRY_POINTS)


def entry_class(name: str) -> Any:
    """The plugin class that a package announces to torch_xla under this name, or None."""
    for point in announced().select(name=name):
        os.environ["PJRT_DEVICE"] = name.upper()
        os.environ.setdefault("XLA_REGISTER_INSTALLED_PLUGINS", "0")
        try:
            with redirect_stdout(sys.stderr):
                return point.load()
        except Exception as error:  # whatever the package's import raises
            raise BackendError(
                lines(
                    f"backend {name!r} is not available: {point.value} does not load: "
                    f"{cause(error)}"
                )
            ) from None
    return None


def _entry_library(name: str, entry: Any) -> str:
    try:
        with redirect_stdout(sys.stderr):
            return str(entry().library_path())
    except Exception as error:
        raise BackendError(
            lines(f"backend {name!r} is not available: it names no plugin file: {cause(error)}")
        ) from None
