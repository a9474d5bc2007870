"""Writing safetensors files as transformers names them, one tensor at a time.

A model that is larger than the host's memory can be written: safetensors' own writer wants all
tensors of a file at once. The format is that of `safetensors_header`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UsageError, lines, listed, shown
from .disk import Disk
from .weight_files import INDEX, SINGLE

SHARD_BYTES = 5_000_000_000
"""The most that is put into one file, unless a single tensor is larger."""
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A tensor that is to be written: its shape and dtype.

    Raises:
        UsageError: weights cannot have this dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in _NAMES:
            raise UsageError(
                lines(
                    f"dtype {self.dtype} is not one of weights",
                    f"expected one of {', '.join(map(str, _NAMES))}",
                )
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    kinds: Mapping[str, Kind],
    shard_bytes: int = SHARD_BYTES,
    disk: Disk | None = None,
) -> list[str]:
    """Write tensors into a folder: `model.safetensors`, or several files with an index.

    Every file is on the disk when this returns, but not yet its name: see `Disk.sync_folder`.

    Args:
        tensors: each of `kinds` once, in any order, of any dtype; they are cast. One at a time is
            held.
        kinds: in the order of the files.
        shard_bytes: most bytes of tensors a file.
        disk: what files are written with.

    Returns:
        The names of the files written.

    Raises:
        UsageError: the tensors are not those of `kinds`.
        OSError: the disk is full, or the folder cannot be written.
    """
    disk = disk or Disk()
    shards = list(_shards(kinds, shard_bytes))
    names = [SINGLE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    where = {
        name: (file, start)
        for file, shard in zip(names, shards, strict=True)
        for name, start in shard.items()
    }
    written: set[str] = set()
    with ExitStack() as stack:
        files = {name: stack.enter_context(disk.create(folder / name)) for name in names}
        headers = {name: _header(shard, kinds) for name, shard in zip(names, shards, strict=True)}
        for name, header in headers.items():
            disk.write_at(folder / name, files[name], 0, header)
        for name, tensor in tensors:
            kind = kind_of(name, tensor, kinds)
            if name in written:
                raise UsageError(lines(f"tensor {shown(name)} comes twice", "expected each once"))
            file, start = where[name]
            start += len(headers[file])
            for piece in _pieces(tensor, kind.dtype):
                disk.write_at(folder / file, files[file], start, piece)
                start += len(piece)
            written.add(name)
        if written != kinds.keys():
            missing = [name for name in kinds if name not in written]
            raise UsageError(
                lines(f"missing tensors: {listed(missing)}", f"expected {len(kinds)} tensors")
            )
        for name, stream in files.items():
            disk.sync(folder / name, stream)
    if len(names) > 1:
        disk.write(folder / INDEX, _index(kinds, where))
        names.append(INDEX)
    return names


def kind_of(name: str, tensor: torch.Tensor, kinds: Mapping[str, Kind]) -> Kind:
    """What a tensor is to be written as.

    Raises:
        UsageError: there is no such tensor, or it has another shape.
    """
    if name not in kinds:
        raise UsageError(lines(f"unexpected tensor {shown(name)}", "expected only the model's"))
    kind = kinds[name]
    if tuple(tensor.shape) != kind.shape:
        raise UsageError(
            lines(f"tensor {name} has shape {list(tensor.shape)}", f"expected {list(kind.shape)}")
        )
    return kind


def _pieces(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """A tensor's bytes in `dtype`, in order."""
    for piece in tensor.reshape(-1).split(_PIECE_BYTES // dtype.itemsize):
        yield piece.to(dtype).contiguous().view(torch.uint8).numpy().data


def _index(kinds: Mapping[str, Kind], where: Mapping[str, tuple[str, int]]) -> bytes:
    document = {
        "metadata": {
            "total_parameters": sum(math.prod(kind.shape) for kind in kinds.values()),
            "total_size": sum(kind.nbytes for kind in kinds.values()),
        },
        "weight_map": {name: file for name, (file, _) in where.items()},
    }
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def _shards(kinds: Mapping[str, Kind], shard_bytes: int) -> Iterator[dict[str, int]]:
    """For every file its tensors, and where behind the header each begins."""
    shard: dict[str, int] = {}
    end = 0
    for name, kind in kinds.items():
        if shard and end + kind.nbytes > shard_bytes:
            yield shard
            shard, end = {}, 0
        shard[name] = end
        end += kind.nbytes
    yield shard


def _header(shard: Mapping[str, int], kinds: Mapping[str, Kind]) -> bytes:
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, start in shard.items():
        kind = kinds[name]
        document[name] = {
            "dtype": _NAMES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [start, start + kind.nbytes],
        }
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight bytes
    return len(header).to_bytes(8, "little") + header
