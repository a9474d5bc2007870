"""Bytes of a weight file, read into memory at a given place. Pure.

The file is not mapped: touching a mapped page behind the end of a file that was cut meanwhile ends
the process by SIGBUS. A short read is an error that can be told.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from ..errors import CheckpointError, cause, lines

_MOST_BYTES = 1 << 30  # Linux reads at most 2 GiB at once


class WeightReader:
    """An open file of weights. May be used by several threads at once.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            # Not blocking: opening a FIFO would wait for its writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from None
        weakref.finalize(self, os.close, self._descriptor)

    def fill(self, buffer: memoryview, start: int) -> None:
        """Read as many bytes as the buffer has, from a place in the file on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        while buffer:
            try:
                count = os.preadv(self._descriptor, [buffer[:_MOST_BYTES]], start)
            except OSError as error:
                raise self._unreadable(error) from None
            if count == 0:
                raise CheckpointError(
                    lines(
                        f"{self._name} is damaged: it was cut while it was read",
                        "expected a whole file of weights; download it again",
                    )
                )
            buffer, start = buffer[count:], start + count

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            lines(f"{self._name} cannot be read: {error.strerror or cause(error)}")
        )
