"""manifest.json of an exported model: size and SHA-256 of each of its files. Pure.

{"format": "parallama-manifest", "version": 1,
 "files": {"model.safetensors": {"bytes": 1234, "sha256": "ab..."}}}
A name is that of a file in the folder, or `additional_chat_templates/NAME`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, cause, lines, shown
from . import model_files
from .disk import Disk

NAME = "manifest.json"
_FORMAT, _VERSION = "parallama-manifest", 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a manifest says of a file: its size in bytes and its SHA-256 in hex."""

    bytes: int
    sha256: str


def write(folder: Path, names: Iterable[str], disk: Disk | None = None) -> Path:
    """Write the manifest of these files of a folder, whole or not at all.

    Args:
        disk: what it is written with.

    Returns:
        The manifest's path.

    Raises:
        CheckpointError: a file is missing, or is none that a manifest can name.
    """
    files = {}
    for name in sorted(set(names)):
        path = _find(folder, name)
        if path is None:
            raise CheckpointError(
                lines(f"{name} is missing in {str(folder)!r}", "expected a file of this name")
            )
        entry = measure(path)
        files[name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    text = json.dumps({"format": _FORMAT, "version": _VERSION, "files": files}, indent=2) + "\n"
    path = folder / NAME
    (disk or Disk()).replace(path, text.encode())
    return path


def read(folder: Path) -> Mapping[str, Entry] | None:
    """File name -> what the folder's manifest says of it, or None if there is no manifest.

    Raises:
        CheckpointError: it is no manifest.
    """
    path = model_files.find(folder, NAME)
    if path is None:
        return None
    document = model_files.read_json(path)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointError(
            lines(
                f"{NAME} is no manifest of parallama's",
                f"expected an object with the format {_FORMAT!r}",
            )
        )
    if document.get("version") != _VERSION:
        raise CheckpointError(
            lines(f"{NAME} is of version {shown(document.get('version'))}", f"expected {_VERSION}")
        )
    files = document.get("files")
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise CheckpointError(
            lines(f"{NAME} has no proper 'files'", 'expected {"NAME": {"bytes": N, "sha256": HEX}}')
        )
    return {
        name: Entry(bytes=entry["bytes"], sha256=entry["sha256"]) for name, entry in files.items()
    }


def check(folder: Path) -> Mapping[str, Entry] | None:
    """Check every file that the manifest names against it.

    Returns:
        What was checked, or None if the folder has no manifest.

    Raises:
        CheckpointError: the first file that is missing or differs; or it is no manifest.
    """
    entries = read(folder)
    for name, entry in (entries or {}).items():
        check_file(folder, name, entry)
    return entries


def check_file(folder: Path, name: str, entry: Entry) -> None:
    """Check one file against what the manifest says of it.

    Raises:
        CheckpointError: it is missing or differs.
    """
    path = _find(folder, name)
    if path is None:
        raise CheckpointError(
            lines(
                f"{NAME} names {shown(name)}, which is missing", "copy or download the folder again"
            )
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise CheckpointError(
            lines(f"{name} has {size} bytes", f"expected {entry.bytes}, from {NAME}")
        )
    found = measure(path)
    if found != entry:
        raise CheckpointError(
            lines(f"{name} has SHA-256 {found.sha256}", f"expected {entry.sha256}, from {NAME}")
        )


def _find(folder: Path, name: str) -> Path | None:
    """A file of the folder, or of the one folder that a model folder can have."""
    inside, _, inner = name.partition("/")
    if inside == model_files.TEMPLATES:
        return model_files.find(folder, inner, inside=inside)
    return model_files.find(folder, name)


def measure(path: Path) -> Entry:
    """Size and SHA-256 of a file, read in pieces."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Entry(bytes=file.tell(), sha256=digest)
    except OSError as error:
        raise CheckpointError(
            lines(
                f"{path.name} cannot be read: {error.strerror or cause(error)}",
                "expected a regular file",
            )
        ) from None


def _is_entry(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"bytes", "sha256"}:
        return False
    size, digest = value["bytes"], value["sha256"]
    return (
        type(size) is int
        and size >= 0
        and isinstance(digest, str)
        and len(digest) == 64
        and not set(digest) - set("0123456789abcdef")
    )
