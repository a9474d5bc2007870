"""Files of a model folder: regular ones, and none outside of it. Pure.

A name that leads elsewhere (`..`, an absolute path, a link) is an error before anything is opened.
So is one of something that would hang its reader (a FIFO, a device). The hub's cache is made of
links: those into its own blobs are followed.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from .. import text_files
from ..errors import CheckpointError, cause, lines, shown
from . import other_contents
from .near_misses import near_folder

ADAPTER = "adapter_config.json"
TEMPLATES = "additional_chat_templates"
"""The one folder that a model folder can have whose files belong to the model."""
JSON_LIMIT_BYTES = 2 << 20
"""The longest JSON that is read: ten times what the largest models' indexes have.

As Python objects, hostile JSON takes up to thirty times its length.
"""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def find(folder: Path, name: str, inside: str = "") -> Path | None:
    """The path of a file in a model folder, or None if there is none of this name.

    Args:
        inside: a folder in the model folder that holds the file.

    Raises:
        CheckpointError: the name is no plain file name, or what it names is no regular file, or is
            outside of the folder, or holds something else (see `other_contents`).
    """
    if not is_plain(name):
        raise CheckpointError(
            lines(
                f"file name {shown(name)} leads out of the model folder",
                "expected the plain name of a file in it",
            )
        )
    path = folder / inside / name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                lines(f"{name} is a link to nothing", "expected a file; download it again")
            ) from None
        return None
    except OSError as error:
        raise CheckpointError(
            lines(
                f"{name} cannot be read: {error.strerror or cause(error)}",
                "expected a regular file",
            )
        ) from None
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "no file")
        raise CheckpointError(lines(f"{name} is {kind}", "expected a regular file"))
    target = Path(os.path.realpath(path))
    if not _encloses(Path(os.path.realpath(folder)), target):
        raise CheckpointError(
            lines(
                f"{name} is a link to {str(target)!r}, out of the model folder",
                "expected a file in the folder",
                "copy the file there",
            )
        )
    other_contents.refuse(path)
    return path


def require(folder: Path, name: str) -> Path:
    """The path of a file that must be in a model folder; see `find`.

    Raises:
        CheckpointError: there is none, or as for `find`.
    """
    path = find(folder, name)
    if path is None:
        raise CheckpointError(
            lines(f"{name} is missing in {str(folder)!r}", "expected a file of this name")
        )
    return path


def read_config(folder: Path) -> Any:
    """The contents of a model folder's config.json.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = find(folder, "config.json")
    if path is None:
        raise CheckpointError(
            lines(
                f"folder {str(folder)!r} has no config.json",
                "expected a model folder as transformers saves it",
                near_folder(folder),
            )
        )
    return read_json(path)


def read_json(path: Path, limit_bytes: int = JSON_LIMIT_BYTES) -> Any:
    """The JSON in a file of a checkpoint.

    Raises:
        CheckpointError: it can't be read, is longer than the limit, isn't JSON, or has a key twice
            in one object.
    """
    other_contents.refuse(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise CheckpointError(
                lines(
                    f"{path.name} has more than {limit_bytes} bytes",
                    "expected a JSON file of sizes and names",
                )
            )
        if not content.strip():
            raise CheckpointError(
                lines(f"{path.name} is empty", "expected JSON; download it again")
            )
        return json.loads(text_files.decode(content), object_pairs_hook=_object)
    except CheckpointError:
        raise
    except _RepeatedKey as error:
        raise CheckpointError(
            lines(
                f"{path.name} has the key {shown(str(error))} twice in one object",
                "expected each once",
            )
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            lines(f"{path.name} cannot be read: {cause(error)}", "expected JSON")
        ) from None


class _RepeatedKey(ValueError):
    """A key that one object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedKey(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in the folder itself.

    It is no path, not `..`, and nothing that the file system refuses.
    """
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return 0 < length < 256 and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def _encloses(folder: Path, target: Path) -> bool:
    """Whether a resolved path is in a resolved folder, or in the blobs that the hub's cache keeps.

    A snapshot of the cache links to these.
    """
    if target.is_relative_to(folder):
        return True
    if folder.parent.name != "snapshots":
        return False
    repository = folder.parent.parent
    if target.parent == repository / "blobs":
        return True
    # huggingface_hub keeps what several repositories share beside them: CACHE/blobs/ab/abcd...
    return (
        target.parent.parent == repository.parent / "blobs"
        and re.fullmatch(r"[0-9a-f]{64}", target.name) is not None
    )
