"""Hand a model back: a folder that transformers loads, with everything that came with the weights.

The folder appears under its name when it is whole and on the disk, or not at all.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError, UsageError, cause, lines
from ..model.dtype_names import unknown_dtype
from ..model.spec import ModelSpec
from . import export_configs, manifest, nonfinite
from .checkpoint import Checkpoint
from .disk import Disk
from .weight_writer import SHARD_BYTES, Kind, kind_of, write

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights can be cast to, by name."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        files: names of all files in the folder, the manifest's among them.
        dtype: of the weights; `mixed` where the checkpoint's differ.
        parameters: their number.
        bytes: of all files.
    """

    folder: Path
    files: tuple[str, ...]
    dtype: str
    parameters: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
        }


def export_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: Checkpoint,
    out: str | Path,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    shard_bytes: int = SHARD_BYTES,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    disk: Disk | None = None,
) -> Exported:
    """Write weights with the config, generation config, tokenizer and templates of a checkpoint.

    Args:
        tensors: every parameter of the source's model by transformers' name, as in a checkpoint, on
            the host, in any order. One at a time is held.
        source: what the weights were made from.
        out: the folder; made with its parents, and must be empty if it is there.
        dtype: to write them in, or one for each.
        progress: called with bytes written and all.
        disk: what files are written with.

    Raises:
        UsageError: the folder has something in it; or the tensors are not the model's.
        CheckpointError: a tensor holds NaN or infinity (or does so in `dtype`), unless that is
            allowed.
        RunError: the folder cannot be written.
    """
    began = time.perf_counter()
    disk = disk or Disk()
    kinds = _kinds(ModelSpec.from_config(source.config), dtype)
    total = sum(kind.nbytes for kind in kinds.values())

    def passing() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for name, tensor in tensors:
            kind = kind_of(name, tensor, kinds)
            cast = tensor.to(kind.dtype)
            if not allow_nonfinite:
                nonfinite.refuse(name, cast, f"the model in {_word(kind.dtype)}")
            yield name, cast
            done += kind.nbytes
            if progress is not None:
                progress(done, total)

    dtypes = list({kind.dtype for kind in kinds.values()})
    dtype_word = _word(*dtypes) if len(dtypes) == 1 else None
    with _folder_at(Path(out), disk) as (folder, unfinished):
        files = write(unfinished, passing(), kinds, shard_bytes, disk)
        files += export_configs.write_config(source, unfinished, dtype_word, disk)
        files += export_configs.write_others(source, unfinished, disk)
        manifest.write(unfinished, files, disk)
        files.append(manifest.NAME)
        size = sum((unfinished / name).stat().st_size for name in files)
    return Exported(
        folder=folder,
        files=tuple(files),
        dtype=_word(*dtypes),
        parameters=sum(math.prod(kind.shape) for kind in kinds.values()),
        bytes=size,
        seconds=time.perf_counter() - began,
    )


def export_checkpoint(
    source: Checkpoint,
    out: str | Path,
    *,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    disk: Disk | None = None,
) -> Exported:
    """Write a checkpoint as a folder, straight from its files, without a device.

    See `export_weights`.

    Args:
        dtype: `auto` is each tensor's own (float32 where it was quantized), or a name of `DTYPES`.
    """
    found = source.sources(ModelSpec.from_config(source.config))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in found:
            yield tensor.name, tensor.read()
            tensor.release()

    to = stored_dtypes(source) if dtype == "auto" else resolve(dtype)
    return export_weights(
        tensors(),
        source,
        out,
        dtype=to,
        shard_bytes=shard_bytes,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
        disk=disk,
    )


def _kinds(spec: ModelSpec, dtype: torch.dtype | Mapping[str, torch.dtype]) -> dict[str, Kind]:
    """Every parameter's shape and dtype."""
    kinds = {}
    for name, shape in spec.parameters():
        to = dtype if isinstance(dtype, torch.dtype) else dtype.get(name)
        if to is None:
            raise UsageError(lines(f"there is no dtype for {name}", "expected one for each"))
        kinds[name] = Kind(shape=shape, dtype=to)
    return kinds


def stored_dtypes(source: Checkpoint) -> dict[str, torch.dtype]:
    """The dtype of every parameter in a checkpoint; float32 where it is quantized."""
    sources = source.sources(ModelSpec.from_config(source.config))
    return {tensor.name: tensor.stored_dtype for tensor in sources}


def resolve(name: str) -> torch.dtype:
    """A dtype of `DTYPES` by name.

    Raises:
        UsageError: there is no such dtype.
    """
    if name not in DTYPES:
        raise unknown_dtype(name, ["auto", *DTYPES])
    return DTYPES[name]


def check_free(out: str | Path) -> Path:
    """The path of a folder that can be made there: nothing is written over.

    Raises:
        UsageError: there is a file, or a folder with something in it.
    """
    folder = Path(os.path.realpath(Path(out).expanduser()))
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            lines(
                f"folder {str(out)!r} is not empty", "expected a new one: nothing is written over"
            )
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(lines(f"{str(out)!r} is a file", "expected a folder, or none yet"))
    return folder


@contextmanager
def _folder_at(out: Path, disk: Disk) -> Iterator[tuple[Path, Path]]:
    """A folder beside it, which gets its name when all went well, and is removed otherwise.

    Its files are to be synced by then.
    """
    folder = check_free(out)
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    try:
        parents = [unfinished.parent, *unfinished.parent.parents]
        made = [parent for parent in parents if not parent.exists()]
        disk.make_folder(unfinished)
        try:
            yield folder, unfinished
            disk.sync_folder(unfinished)
            disk.rename(unfinished, folder)
            for parent in dict.fromkeys([folder.parent, *(each.parent for each in made)]):
                disk.sync_folder(parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise RunError(
            lines(
                f"folder {str(out)!r} cannot be written: {error.strerror or cause(error)}",
                "give another one",
            )
        ) from None


def _word(*dtypes: torch.dtype) -> str:
    return str(dtypes[0]).removeprefix("torch.") if len(dtypes) == 1 else "mixed"
