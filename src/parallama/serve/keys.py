"""API keys: read where they are kept, and not shown where others look. Pure."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from ..environment import api_key
from ..errors import UsageError, cause, lines

LEAST = 8
"""Letters of a key."""


def read_keys(given: Sequence[str], file: Path | None) -> list[str]:
    """The keys of `--api-key`, `--api-key-file` and PARALLAMA_API_KEY; none if there are none.

    Raises:
        UsageError: the file cannot be read or holds none, or a key is too short or no ASCII word.
    """
    keys = [*given]
    origin = "--api-key"
    if file is not None:
        origin = f"--api-key-file {file}"
        try:
            found = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(lines(f"{origin} cannot be read: {cause(error)}")) from None
        keys += [line.strip() for line in found if line.strip()]
        if len(keys) == len(given):
            raise UsageError(lines(f"{origin} holds no key", "expected a key in each line"))
    elif not keys and (inherited := api_key()) is not None:
        keys, origin = [inherited], "PARALLAMA_API_KEY"
    for key in keys:
        if len(key) < LEAST or not (key.isascii() and key.isprintable() and " " not in key):
            raise UsageError(
                lines(
                    f"a key of {origin} has {len(key)} letters, or some that no header can hold",
                    f"expected at least {LEAST} letters, digits and signs, as"
                    " `openssl rand -hex 32` prints",
                )
            )
    return keys


def hide_arguments(words: Sequence[str]) -> None:
    """Overwrite words of this process's command line, which others could list."""
    shown = Path("/proc/self/cmdline").read_bytes()
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    begin = int(fields[45])  # `arg_start` in proc(5), the 48th field
    for word in {each.encode() for each in words}:
        at = shown.find(word)
        while at >= 0 and begin:
            ctypes.memset(begin + at, ord("x"), len(word))
            at = shown.find(word, at + len(word))
