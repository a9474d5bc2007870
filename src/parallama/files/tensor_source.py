"""Tensors of a checkpoint that are read in slices, when they are asked for, and counted."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch

from .safetensors_header import StoredTensor
from .weight_reader import WeightReader

Slices = tuple[slice, ...]
"""Start and stop of every dim."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PIECE_BYTES = 1 << 20


class TensorSource(ABC):
    """A parameter as it is stored in a checkpoint.

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

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that it has in the model, and gets again in one that is written."""
        return self.dtype

    @abstractmethod
    def read(self, slices: Slices | None = None) -> torch.Tensor:
        """Some slices of it, or all; not to be written to.

        Raises:
            CheckpointError: the file ends too early, or cannot be read.
        """

    def read_as(
        self, slices: Slices, dtype: torch.dtype, look: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        """Some slices of it in a dtype; not to be written to.

        Args:
            look: called with every piece of them, as it is stored.
        """
        part = self.read(slices)
        look(part)
        return part.to(dtype)

    @abstractmethod
    def release(self) -> None:
        """Give back the memory that reading took."""


class SafetensorsSource(TensorSource):
    """A tensor of a safetensors file: each `read` gives memory of its own.

    Args:
        stored: where it is.
        reader: of that file.
    """

    def __init__(self, name: str, stored: StoredTensor, reader: WeightReader) -> None:
        super().__init__(name, stored.file.name, stored.shape, _DTYPES[stored.dtype])
        self._reader = reader
        self._start = stored.start

    def read(self, slices: Slices | None = None) -> torch.Tensor:
        slices = slices or tuple(slice(0, size) for size in self.shape)
        part = torch.empty(_shape(slices), dtype=self.dtype)
        self.bytes_read += part.nbytes
        buffer, at = _bytes(part), 0
        for start, count in self._runs(slices):
            self._reader.fill(buffer[at : at + count], self._start + start)
            at += count
        return part

    def read_as(
        self, slices: Slices, dtype: torch.dtype, look: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        """What is one run of bytes is cast piece by piece: only the result is as large as that."""
        runs = list(self._runs(slices))
        if len(runs) > 1 or dtype == self.dtype:
            return super().read_as(slices, dtype, look)
        part = torch.empty(_shape(slices), dtype=dtype)
        start = self._start + runs[0][0]
        count = _PIECE_BYTES // self.dtype.itemsize
        stored = torch.empty(min(count, part.numel()), dtype=self.dtype)
        for piece in part.view(-1).split(count):
            read = stored[: len(piece)]
            self._reader.fill(_bytes(read), start)
            start += read.nbytes
            self.bytes_read += read.nbytes
            look(read)
            piece.copy_(read)
        return part

    def release(self) -> None:
        """Nothing is kept."""

    def _runs(self, slices: Slices) -> Iterator[tuple[int, int]]:
        """The bytes of some slices, in order: where each run begins in the tensor, and its length.

        A run goes over the last dim that is cut, and the whole ones behind it.
        """
        cut = [part.stop - part.start < size for part, size in zip(slices, self.shape, strict=True)]
        last = max((dim for dim, is_cut in enumerate(cut) if is_cut), default=0)
        steps = [
            math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize for dim in range(len(self.shape))
        ]
        first, count = 0, self.dtype.itemsize
        if slices:
            first = slices[last].start * steps[last]
            count = (slices[last].stop - slices[last].start) * steps[last]
        for index in itertools.product(*(range(part.start, part.stop) for part in slices[:last])):
            outside = sum(number * step for number, step in zip(index, steps, strict=False))
            yield outside + first, count


def _shape(slices: Slices) -> list[int]:
    return [part.stop - part.start for part in slices]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def safetensors_sources(tensors: Mapping[str, StoredTensor]) -> list[SafetensorsSource]:
    """Tensors of safetensors files, by parameter name, whose headers were read already.

    Nothing else is read yet.

    Raises:
        CheckpointError: a file cannot be opened.
    """
    files = dict.fromkeys(stored.file for stored in tensors.values())
    readers = {path: WeightReader(path) for path in files}
    return [
        SafetensorsSource(name, stored, readers[stored.file]) for name, stored in tensors.items()
    ]
