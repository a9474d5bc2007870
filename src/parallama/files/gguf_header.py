"""The header of a GGUF file, walked once before a reader believes it. Pure.

Absurd counts and lengths would cost that reader time and memory. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

from ..errors import CheckpointError, cause, lines, shown
from . import other_contents
from .weight_reader import WeightReader

_MOST_ENTRIES = 1 << 16
_MOST_ELEMENTS = 1 << 22
_LONGEST_TEXT = 16 << 20
_LONGEST_HEADER = 256 << 20
_MOST_SQUARES = 1 << 30
"""Of a vocabulary's lengths, added up: transformers tries every split of every token."""
_MOST_DIMS = 4
_MOST_NUMBERS = 1 << 50
_WIDTHS = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9


def check(path: Path) -> int:
    """Walk metadata and tensor table; no value is kept but names.

    Returns:
        Their bytes, from the file's beginning on.

    Raises:
        CheckpointError: not a regular file, or not a GGUF whose counts and lengths are those of a
            model.
    """
    try:
        # Not blocking: opening a FIFO would wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                _refuse(path, "it is no regular file")
            other_contents.refuse(path)
            _Walk(path, file).run()
            length = file.tell()
    except OSError as error:
        _refuse(path, error.strerror or cause(error))
    if length > _LONGEST_HEADER:
        _refuse(path, f"its header has {length} bytes, more than {_LONGEST_HEADER}")
    return length


@contextmanager
def private_copy(path: Path) -> Iterator[Path]:
    """A file of the header alone, checked, for a reader that maps it.

    Nobody else can cut it while it is read: a mapped file that is cut ends the process.

    Raises:
        CheckpointError: as `check`.
    """
    header = bytearray(check(path))
    WeightReader(path).fill(memoryview(header), 0)
    with tempfile.TemporaryDirectory(prefix="parallama-gguf-") as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(header)
        yield copy


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(
        lines(
            f"{path.name} is not a GGUF file that can be read: {what}",
            "expected GGUF version 2 or 3",
        )
    )


class _Walk:
    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def run(self) -> None:
        if self._file.read(4) != b"GGUF":
            _refuse(self._path, "it does not start with GGUF")
        (version,) = self._unpack("<I")
        if version in (2 << 24, 3 << 24):
            _refuse(self._path, "it is big-endian")
        if version not in (2, 3):
            _refuse(self._path, f"it is of version {version}")
        tensors, entries = self._unpack("<QQ")
        self._count(entries, _MOST_ENTRIES, "metadata entries")
        self._count(tensors, _MOST_ENTRIES, "tensors")
        seen: set[str] = set()
        for _ in range(entries):
            key = self._text()
            if key in seen:
                _refuse(self._path, f"metadata {shown(key)} stands there twice")
            seen.add(key)
            self._value(*self._unpack("<I"))
        names: set[str] = set()
        for _ in range(tensors):
            name = self._text()
            if name in names:
                _refuse(self._path, f"tensor {shown(name)} stands there twice")
            names.add(name)
            (dims,) = self._unpack("<I")
            self._count(dims, _MOST_DIMS, f"dims of tensor {shown(name)}")
            shape = self._unpack(f"<{dims}Q")
            if math.prod(shape) > _MOST_NUMBERS or 0 in shape:
                in_order = shown(list(reversed(shape)))
                _refuse(self._path, f"tensor {shown(name)} has the shape {in_order}")
            self._skip(12)  # type and offset: the reader's sizes tell where the tensor ends

    def _value(self, kind: int) -> None:
        if kind in _WIDTHS:
            self._skip(_WIDTHS[kind])
        elif kind == _TEXT:
            self._text()
        elif kind == _ARRAY:
            element, count = self._unpack("<IQ")
            self._count(count, _MOST_ELEMENTS, "elements in an array")
            if element in _WIDTHS:
                self._skip(count * _WIDTHS[element])
            elif element == _TEXT:
                self._texts(count)
            else:
                _refuse(self._path, f"its metadata has an array of type {element}")
        else:
            _refuse(self._path, f"its metadata has a value of type {kind}")

    def _texts(self, count: int) -> None:
        squares = 0
        for _ in range(count):
            (length,) = self._unpack("<Q")
            squares += length**2
            if squares > _MOST_SQUARES:
                _refuse(self._path, "its metadata has an array of texts that are too long")
            self._skip(length)

    def _count(self, count: int, most: int, what: str) -> None:
        if count > most:
            _refuse(self._path, f"it should have {count} {what}, more than {most}")

    def _unpack(self, form: str) -> tuple[int, ...]:
        content = self._file.read(struct.calcsize(form))
        if len(content) < struct.calcsize(form):
            _refuse(self._path, f"its header is cut short at byte {self._file.tell()}")
        return struct.unpack(form, content)

    def _skip(self, count: int) -> None:
        at = self._file.tell() + count
        if at > self._size:
            _refuse(self._path, f"its header goes on to byte {at}, and the file has {self._size}")
        self._file.seek(at)

    def _text(self) -> str:
        (length,) = self._unpack("<Q")
        self._count(length, _LONGEST_TEXT, "bytes in a text")
        at = self._file.tell()
        self._skip(length)
        self._file.seek(at)
        return self._file.read(length).decode("utf-8", errors="replace")
