"""Writing safetensors files as transformers names them, one tensor at a time: a model that is larger than the host's memory can be written.

The format is that of `safetensors_header`. (safetensors' own writer wants all tensors of a file at once.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from .weight_files import INDEX, SINGLE

SHARD_BYTES = 5_000_000_000
"""The most that is put into one file, unless a single tensor is larger."""
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A tensor that is to be written: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    kinds: Mapping[str, Kind],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write tensors into a folder: `model.safetensors`, or several files with an index.

    Args:
        tensors: each of `kinds` once, in any order, of any dtype; they are cast. One at a time is held.
        kinds: in the order of the files.
        shard_bytes: most bytes of tensors a file.

    Returns:
        The names of the files written.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    shards = list(_shards(kinds, shard_bytes))
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    where = {
        name: (file, start)
        for file, shard in zip(names, shards, strict=True)
        for name, start in shard.items()
    }
    written: set[str] = set()
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        starts = {
            name: files[name].write(_header(shard, kinds))
            for name, shard in zip(names, shards, strict=True)
        }
        for name, tensor in tensors:
            assert (
                name in kinds and name not in written and tuple(tensor.shape) == kinds[name].shape
            ), name
            file, start = where[name]
            files[file].seek(starts[file] + start)
            for piece in tensor.reshape(-1).split(_PIECE_BYTES // kinds[name].dtype.itemsize):
                files[file].write(
                    piece.to(kinds[name].dtype).contiguous().view(torch.uint8).numpy().data
                )
            written.add(name)
        assert written == kinds.keys(), kinds.keys() - written
        for stream in files.values():
            stream.flush()
            os.fsync(stream.fileno())
    if len(names) > 1:
        total = sum(kind.nbytes for kind in kinds.values())
        count = sum(math.prod(kind.shape) for kind in kinds.values())
        index = {
            "metadata": {"total_parameters": count, "total_size": total},
            "weight_map": {name: file for name, (file, _) in where.items()},
        }
        (folder / INDEX).write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        names.append(INDEX)
    return names


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
