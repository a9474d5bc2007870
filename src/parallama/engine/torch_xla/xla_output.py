"""What XLA writes: warnings, which are hidden, and its programs, for those who ask for them.

It is told by environment variables, before torch-xla makes its client.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from ...errors import FitError, lines
from .lean_import import runtime_runs

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_folder: tempfile.TemporaryDirectory[str] | None = None


def hide_warnings() -> None:
    """Have XLA log errors only, unless the user has said what it shall log.

    It warns about every program that GSPMD partitions. torch_xla sets the level to 1 when it is
    imported, which shows warnings. XLA reads the level when it first logs something.
    """
    given = os.environ.get(_LEVEL)
    by_torch_xla = given == "1" and "torch_xla" in sys.modules and not _is_users()
    if given is None or by_torch_xla:
        os.environ[_LEVEL] = "2"


def _is_users() -> bool:
    """Whether this process was started with a log level."""
    try:
        variables = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(variable.startswith(f"{_LEVEL}=".encode()) for variable in variables)


def keep_programs() -> None:
    """Have XLA write every program as text, with the names of modules that its parts come from.

    Raises:
        FitError: torch-xla's runtime is running; it has read its flags already.
    """
    global _folder
    if _folder is not None:
        return
    if runtime_runs():
        raise FitError(
            lines(
                "torch_xla's runtime was started before its programs could be asked for",
                "use a process of its own",
            )
        )
    _folder = tempfile.TemporaryDirectory(prefix="parallama-hlo-")
    os.environ["XLA_IR_DEBUG"] = os.environ["XLA_HLO_DEBUG"] = "1"
    given = os.environ.get("XLA_FLAGS", "")
    dump = f"--xla_dump_to={_folder.name} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{given} {dump}".lstrip()
    if "torch_xla" in sys.modules:  # it has read XLA_IR_DEBUG when it was imported
        import torch_xla

        torch_xla._XLAC._set_ir_debug(True)


def written_files() -> set[Path]:
    """The files about programs that XLA has written so far; none without `keep_programs`."""
    return set() if _folder is None else set(Path(_folder.name).iterdir())
