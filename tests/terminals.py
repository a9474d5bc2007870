"""Pseudo-terminals, as a test reads them."""

from __future__ import annotations

import os
from contextlib import suppress


def all_of(ours: int) -> str:
    """All that was written to a pseudo-terminal whose other end is closed; closes this one.

    What is written comes in pieces, and some time later: one read would not do.
    """
    shown = b""
    with suppress(OSError):  # there is no more
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    return shown.decode(errors="replace")
