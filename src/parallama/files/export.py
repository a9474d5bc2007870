"""Hand a model back: a folder that transformers loads, with everything that came with the weights.

What loading did is undone: zero and repeated heads, padded sizes, splits. Tied weights stay tied. The folder appears under its name when it is whole, or not at all.
"""

from __future__ import annotations

import json
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
from ..model.spec import ModelSpec
from . import manifest, model_files, nonfinite, tokenizer_files
from .checkpoint import Checkpoint, SafetensorsFolder
from .weight_writer import SHARD_BYTES, Kind, write

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights can be cast to, by name."""
_CODE_KEYS = ("auto_map",)
"""Keys of a config.json that name code, which is not copied."""


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
) -> Exported:
    """Write weights with the config, generation config, tokenizer and chat template of a checkpoint.

    Args:
        tensors: every parameter of the source's model by transformers' name, as in a checkpoint, on the host, in any order. One at a time is held.
        source: what the weights were made from.
        out: the folder; made with its parents, and must be empty if it is there.
        dtype: to write them in, or one for each.
        progress: called with bytes written and all.

    Raises:
        UsageError: the folder has something in it.
        CheckpointError: a tensor holds NaN or infinity (or does so in `dtype`), unless that is allowed.
        RunError: the folder cannot be written.
    """
    began = time.perf_counter()
    spec = ModelSpec.from_config(source.config)
    kinds = {
        name: Kind(shape=shape, dtype=dtype if isinstance(dtype, torch.dtype) else dtype[name])
        for name, shape in spec.parameters()
    }
    total = sum(kind.nbytes for kind in kinds.values())

    def passing() -> Iterator[tuple[str, torch.Tensor]]:
        done = 0
        for name, tensor in tensors:
            cast = tensor.to(kinds[name].dtype)
            if not allow_nonfinite:
                nonfinite.refuse(name, cast, f"the model in {_word(kinds[name].dtype)}")
            yield name, cast
            done += kinds[name].nbytes
            if progress is not None:
                progress(done, total)

    with _folder_at(Path(out)) as (folder, unfinished):
        dtypes = {kind.dtype for kind in kinds.values()}
        files = write(unfinished, passing(), kinds, shard_bytes)
        files += _write_config(source, unfinished, dtypes.pop() if len(dtypes) == 1 else None)
        files += _write_others(source, unfinished)
        manifest.write(unfinished, files)
        files.append(manifest.NAME)
        size = sum((unfinished / name).stat().st_size for name in files)
    return Exported(
        folder=folder,
        files=tuple(files),
        dtype=_word(*{kind.dtype for kind in kinds.values()}),
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
) -> Exported:
    """Write a checkpoint as a folder, straight from its files, without a device; see `export_weights`.

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
    )


def stored_dtypes(source: Checkpoint) -> dict[str, torch.dtype]:
    """What every parameter of a checkpoint is in, there; float32 where it is quantized."""
    return {
        tensor.name: tensor.dtype for tensor in source.sources(ModelSpec.from_config(source.config))
    }


def resolve(name: str) -> torch.dtype:
    """A dtype of `DTYPES` by name.

    Raises:
        UsageError: there is no such dtype.
    """
    if name not in DTYPES:
        raise UsageError(lines(f"dtype {name!r} is unknown", f"expected auto, {', '.join(DTYPES)}"))
    return DTYPES[name]


def check_free(out: str | Path) -> Path:
    """Raise `UsageError` unless a folder can be made there: nothing is written over."""
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
def _folder_at(out: Path) -> Iterator[tuple[Path, Path]]:
    """A folder under another name beside it, which gets its own when all went well and is removed otherwise."""
    folder = check_free(out)
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    try:
        unfinished.mkdir(parents=True)
        try:
            yield folder, unfinished
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise RunError(
            lines(
                f"folder {str(out)!r} cannot be written: {error.strerror or cause(error)}",
                "give another one",
            )
        ) from None


def _write_config(source: Checkpoint, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """config.json, as it came, but for what is written: the dtype, and no key that names code."""
    document: dict[str, Any] = (
        dict(model_files.read_config(source.location))
        if isinstance(source, SafetensorsFolder)
        else _described(source.config)
    )
    for key in _CODE_KEYS:
        document.pop(key, None)
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in document and "dtype" not in document else "dtype"
        document[key] = _word(dtype)
    _write_json(folder / "config.json", document)
    return ["config.json"]


def _described(config: Any) -> dict[str, Any]:
    """The config.json of a checkpoint that has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    document = config.to_diff_dict()
    return {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]} | document


def _write_others(source: Checkpoint, folder: Path) -> list[str]:
    """Generation config, tokenizer and chat template: a folder's own files as they are, or what another checkpoint says."""
    if isinstance(source, SafetensorsFolder):
        own = tokenizer_files.files(source.location)
        generation = model_files.find(source.location, "generation_config.json")
        own |= {generation.name: generation} if generation is not None else {}
        for name, path in own.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        return list(own)
    if source.generation:
        _write_json(folder / "generation_config.json", source.generation)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return sorted(name for name in there if name != "config.json" and not name.startswith("model"))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _word(*dtypes: torch.dtype) -> str:
    return str(dtypes[0]).removeprefix("torch.") if len(dtypes) == 1 else "mixed"
