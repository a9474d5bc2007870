"""Tensors of a checkpoint that are read in slices, when they are asked for, and counted."""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError, cause, lines
from .safetensors_header import StoredTensor

Slices = tuple[slice, ...]
"""Start and stop of every dim."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorSource(ABC):
    """A parameter as it lies in a checkpoint.

    Attributes:
        name: transformers' name.
        file: name of the file that holds it.
        shape, dtype: as `read` gives them.
        bytes_read: of what was asked for so far.
    """

    def __init__(self, name: str, file: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name = name
        self.file = file
        self.shape = shape
        self.dtype = dtype
        self.bytes_read = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def read(self, slices: Slices | None = None) -> torch.Tensor:
        """Some slices of it, or all; not to be written to."""

    @abstractmethod
    def release(self) -> None:
        """Give back the memory that reading took."""


class MappedTensor(TensorSource):
    """A tensor in a mapped file: `read` gives views, and only what is then copied from them is read from the disk."""

    def __init__(self, name: str, stored: StoredTensor, mapped: mmap.mmap) -> None:
        super().__init__(name, stored.file.name, stored.shape, _DTYPES[stored.dtype])
        self._map = mapped
        self._start = stored.start

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        count = math.prod(self.shape)
        flat = (
            torch.frombuffer(self._map, dtype=self.dtype, count=count, offset=self._start)
            if count
            else torch.empty(0, dtype=self.dtype)
        )
        part = flat.view(self.shape)
        part = part if slices is None else part[slices]
        self.bytes_read += part.nbytes
        if part.numel() and part.is_contiguous() and hasattr(mmap, "MADV_WILLNEED"):
            self._advise(
                mmap.MADV_WILLNEED, self._start + (part.data_ptr() - flat.data_ptr()), part.nbytes
            )
        return part

    def release(self) -> None:
        """The pages go from this process's memory; a view that somebody still holds reads them again from the file."""
        if self.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            self._advise(mmap.MADV_DONTNEED, self._start, self.nbytes)

    def _advise(self, advice: int, start: int, count: int) -> None:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(advice, first, start + count - first)


def mapped(tensors: Mapping[str, StoredTensor]) -> list[MappedTensor]:
    """Tensors of safetensors files, by parameter name, whose headers were read already; nothing else is read yet.

    The mappings are private: nothing is ever written back.

    Raises:
        CheckpointError: a file cannot be mapped.
    """
    # Not reserved: a file may be larger than what the machine would promise to a writer.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    maps: dict[Path, mmap.mmap] = {}
    for path in dict.fromkeys(stored.file for stored in tensors.values()):
        try:
            with path.open("rb") as file:
                maps[path] = mmap.mmap(
                    file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                lines(f"{path.name} cannot be read: {cause(error)}", "expected a safetensors file")
            ) from None
        last = max(stored.end for stored in tensors.values() if stored.file == path)
        if last > len(maps[path]):
            raise CheckpointError(
                lines(
                    f"{path.name} is damaged: it was cut while it was read",
                    "expected a whole safetensors file; download it again",
                )
            )
    return [MappedTensor(name, stored, maps[stored.file]) for name, stored in tensors.items()]
