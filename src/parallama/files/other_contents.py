"""Files that hold something else than their name says: pointers, web pages, archives. Pure.

They come of a clone without Git LFS, of a download that was answered with an error or a page, or of
a renamed file.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, lines

_DOWNLOAD = "download it again, with `hf download` or from its `resolve` address"
_UNPACK = "unpack it first"
# Beginning of a file -> what it is, and what to do.
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://(git-lfs|hawser)\.", "a Git LFS pointer", "run `git lfs pull` there"),
    (rb"(\.git|(\.\./)+\.git)?/annex/objects/", "a git-annex pointer", "run `git annex get` there"),
    (rb"\s*<(!doctype|html)", "a web page", _DOWNLOAD),
    (rb"<\?xml", "a server's answer", _DOWNLOAD),
    (
        rb'(Entry|Repository) not found|Invalid (username|credentials)|Access to |\{"error":',
        "the hub's refusal",
        f"check your access to the model, then {_DOWNLOAD}",
    ),
    (rb"\x1f\x8b", "a gzip archive", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (rb"\xfd7zXZ", "an xz archive", _UNPACK),
    (rb"PK\x03\x04", "a zip archive, as torch.save writes them", "convert it to safetensors"),
    (rb"\x89HDF", "an HDF5 file, as Keras writes them", "convert it to safetensors"),
    (rb"GGUF", "a GGUF file", "name it *.gguf, and give the file itself"),
)
_LONGEST = 64


def refuse(path: Path) -> None:
    """Raise `CheckpointError` if a file begins as something that no model folder's file is.

    What cannot be read is left to its reader.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_LONGEST)
            size = path.stat().st_size
    except OSError:
        return
    for pattern, what, remedy in _BEGINNINGS:
        if re.match(pattern, start, re.IGNORECASE) and not (
            what == "a GGUF file" and path.suffix == ".gguf"
        ):
            raise CheckpointError(
                lines(
                    f"{path.name} is {what} of {size} bytes, not the file itself",
                    "expected what its name says",
                    remedy,
                )
            )
