"""Texts as editors and shells leave them: UTF-8 with or without a byte order mark, or UTF-16. Pure.

Windows' editors begin a file with a byte order mark, and its shell writes UTF-16.
"""

from __future__ import annotations

import codecs
from pathlib import Path

MARK = "\ufeff"
"""The byte order mark, decoded."""


def decode(content: bytes) -> str:
    """The text of these bytes, without the byte order mark.

    Raises:
        UnicodeDecodeError: it is neither UTF-8, nor UTF-16 that begins with a byte order mark.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.removeprefix(codecs.BOM_UTF8).decode()


def read(path: Path) -> str:
    r"""The text of a file; its lines end with `\n`.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: as `decode`.
    """
    return decode(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
