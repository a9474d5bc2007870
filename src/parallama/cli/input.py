"""Texts that commands read from standard input. Pure."""

from __future__ import annotations

from collections.abc import Callable

from .. import text_files
from ..errors import UsageError, lines


def text_of(read: Callable[[], str]) -> str:
    """What `read` reads of standard input.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        text = read()
        text.encode()  # in some locales Python lets bytes through, as lone surrogates
    except UnicodeError:
        raise UsageError(
            lines("standard input cannot be read: it is not UTF-8 text", "expected a text")
        ) from None
    return text.removeprefix(text_files.MARK)
