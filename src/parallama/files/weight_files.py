"""Which safetensors file of a model folder holds which parameter. Pure.

The files' headers and the index are checked against the config before any tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, cause, lines, listed, shown
from ..model.spec import ModelSpec
from . import model_files, safetensors_header, weight_hints, wrapped_names
from .safetensors_header import StoredTensor
from .weight_hints import EMBEDDING, HEAD

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED_DTYPES = ("F32", "BF16", "F16", "F64")
"""Dtypes that weights can have in a file."""
PICKLES = (
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"),
    *(".npz", ".npy", ".h5", ".msgpack"),
)
_ROTARY_TABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Where a model's parameters are.

    Attributes:
        files: those that are read.
        parameters: every parameter's name -> its tensor.
        ignored: tensors, files and a prefix of names that a model can do without -> why each is
            not read.
        second_head: the head of a model that shares the embedding's weight, where the files hold it
            as well; it must be equal.
    """

    files: tuple[Path, ...]
    parameters: Mapping[str, StoredTensor]
    ignored: Mapping[str, str]
    second_head: StoredTensor | None = None


def survey(folder: Path, spec: ModelSpec) -> WeightFiles:
    """Find every parameter of a model in a folder's safetensors files.

    Only headers and the index are read.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor is missing, unexpected, or not as
            the config says.
    """
    index = model_files.find(folder, INDEX)
    claimed = None if index is None else read_index(index)
    names = _without_index(folder) if claimed is None else sorted(set(claimed.values()))
    wanted = dict(spec.parameters())
    stored = _stored(folder, names, claimed, most=2 * len(wanted) + 256)
    if claimed is not None:
        _check_claims(claimed, stored)
    plain, prefix = wrapped_names.plain(
        stored,
        wanted,
        lambda name: bool(_ROTARY_TABLE.fullmatch(name)) or (name == HEAD and spec.tied),
    )
    where = {plain[name]: tensor for name, tensor in stored.items()}
    sources = {name: name for name in wanted}
    if spec.tied and EMBEDDING not in where and HEAD in where:
        sources[EMBEDDING] = HEAD
    ignored = _left_over(where, set(sources.values()), wanted, spec)
    parameters = _match(where, sources, wanted, names)
    second = where.get(HEAD) if spec.tied and sources[EMBEDDING] == EMBEDDING else None
    return WeightFiles(
        files=tuple(folder / name for name in names),
        parameters=parameters,
        ignored=prefix | ignored | _other_files(folder, names),
        second_head=second,
    )


def _stored(
    folder: Path, names: list[str], claimed: Mapping[str, str] | None, most: int
) -> dict[str, StoredTensor]:
    """Every tensor of some files, each where the index claims that it is.

    Args:
        claimed: tensor to file, of the index, if there is one.
        most: refuse a file of more tensors.
    """
    where: dict[str, StoredTensor] = {}
    for name in names:
        tensors = safetensors_header.read(_file(folder, name), most).values()
        if not tensors:
            raise CheckpointError(
                lines(f"{name} holds no tensors", "expected some of the model's; download it again")
            )
        for tensor in tensors:
            if tensor.name in where:
                raise CheckpointError(
                    lines(
                        f"{name}: tensor {tensor.name} stands in two files",
                        f"the other is {where[tensor.name].file.name}",
                    )
                )
            if claimed is not None and claimed.get(tensor.name) != name:
                raise CheckpointError(
                    lines(
                        f"{name} holds tensor {tensor.name}",
                        f"{INDEX} says {_claim(claimed, tensor.name)}",
                    )
                )
            where[tensor.name] = tensor
    return where


def check_second_head(weights: WeightFiles) -> None:
    """Check that a head which is stored beside the embedding that it shares is equal to it.

    Otherwise it would be ignored wrongly. Reads both.

    Raises:
        CheckpointError: it differs.
    """
    second, embedding = weights.second_head, weights.parameters[EMBEDDING]
    if second is not None and not (second.dtype == embedding.dtype and _equal(second, embedding)):
        raise CheckpointError(
            lines(
                f"{second.file.name}: tensor {second.name} differs from {embedding.name}",
                "expected the same: the config has tie_word_embeddings",
                "set tie_word_embeddings to false in config.json "
                "if the model has a head of its own",
            )
        )


def _equal(one: StoredTensor, other: StoredTensor, piece: int = 1 << 20) -> bool:
    try:
        with one.file.open("rb") as first, other.file.open("rb") as second:
            first.seek(one.start)
            second.seek(other.start)
            left = one.end - one.start
            while left > 0:
                size = min(piece, left)
                if first.read(size) != second.read(size):
                    return False
                left -= size
    except OSError as error:
        raise CheckpointError(
            lines(f"{one.file.name} cannot be read: {error.strerror or cause(error)}")
        ) from None
    return True


def _left_over(
    where: Mapping[str, StoredTensor],
    used: set[str],
    wanted: Mapping[str, tuple[int, ...]],
    spec: ModelSpec,
) -> dict[str, str]:
    """The stored tensors that no parameter is read from, each with the reason why not.

    Raises:
        CheckpointError: there is no such reason.
    """
    ignored = {}
    for name, tensor in where.items():
        if name in used:
            continue
        if _ROTARY_TABLE.fullmatch(name):
            ignored[name] = "a table of rotary frequencies, which are computed from the config"
        elif name == HEAD and spec.tied:
            _check(tensor, wanted[EMBEDDING])
            ignored[name] = "the head shares the embedding's weight, to which this is equal"
        else:
            found = wrapped_names.wrapper(name)
            raise CheckpointError(
                lines(
                    f"{tensor.file.name}: unexpected tensor {name}"
                    + (f", as {found[0]} names it" if found else ""),
                    f"expected only those of a {spec.model_type} model with this config",
                    f"save {found[1]}" if found else "",
                )
            )
    return ignored


def _match(
    where: Mapping[str, StoredTensor],
    sources: Mapping[str, str],
    wanted: Mapping[str, tuple[int, ...]],
    files: Sequence[str],
) -> dict[str, StoredTensor]:
    """Every parameter's tensor, of the right shape and dtype.

    Args:
        sources: parameter to the name of its tensor.
        files: those that were read, for the message.
    """
    parameters = {}
    for name, shape in wanted.items():
        if sources[name] in where:
            _check(where[sources[name]], shape)
            parameters[name] = where[sources[name]]
    missing = [name for name in wanted if name not in parameters]
    if missing:
        raise CheckpointError(
            lines(
                f"missing tensors: {listed(missing)}",
                f"expected {len(wanted)} in {len(files)} file(s)",
                weight_hints.of_missing(missing, files),
            )
        )
    return parameters


def _check(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            lines(
                f"{tensor.file.name}: tensor {tensor.name} has shape {list(tensor.shape)}",
                f"expected {list(shape)}, from the config",
                weight_hints.of_shape(tensor.name, tensor.shape, shape),
            )
        )
    if tensor.dtype not in STORED_DTYPES:
        raise CheckpointError(
            lines(
                f"{tensor.file.name}: tensor {tensor.name} is of dtype {tensor.dtype}",
                f"expected one of {', '.join(STORED_DTYPES)}",
            )
        )


def read_index(index: Path) -> dict[str, str]:
    """The tensors that an index names -> the files that hold them.

    Raises:
        CheckpointError: it cannot be read, or names other files than safetensors beside it.
    """
    document: Any = model_files.read_json(index)
    claimed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(claimed, dict) or not all(isinstance(name, str) for name in claimed.values()):
        raise CheckpointError(lines(f"{INDEX} has no weight_map of names to files"))
    for name in claimed.values():
        if not model_files.is_plain(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                lines(
                    f"{INDEX} names the file {shown(name)}",
                    "expected a *.safetensors file in the same folder",
                )
            )
    return claimed


def _claim(claimed: Mapping[str, str], tensor: str) -> str:
    return f"that {claimed[tensor]} holds it" if tensor in claimed else "nothing of it"


def _check_claims(claimed: Mapping[str, str], where: Mapping[str, StoredTensor]) -> None:
    for name, file in claimed.items():
        if name not in where:
            raise CheckpointError(
                lines(f"{INDEX} says that {file} holds tensor {name}", "it does not")
            )


def _file(folder: Path, name: str) -> Path:
    file = model_files.find(folder, name)
    if file is None:
        raise CheckpointError(lines(f"{INDEX} names {name!r}, which is missing"))
    return file


def _names(folder: Path) -> list[str]:
    try:
        # A name with a dot in front is another program's: macOS leaves `._model.safetensors`.
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise CheckpointError(
            lines(f"folder {str(folder)!r} cannot be read: {error.strerror or cause(error)}")
        ) from None


def _without_index(folder: Path) -> list[str]:
    """`model.safetensors` where there is one, as transformers does; else all."""
    names = _names(folder)
    weights = [name for name in names if name.endswith(".safetensors")]
    if SINGLE in weights:
        return [SINGLE]
    if weights:
        return weights
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            lines(
                f"folder {str(folder)!r} has only pickle weights: {listed(pickles, 2)}",
                "expected *.safetensors: pickles can run code and are never loaded",
                "convert it with transformers' save_pretrained",
            )
        )
    raise CheckpointError(
        lines(
            f"folder {str(folder)!r} has no *.safetensors file",
            f"expected {SINGLE}, or several with an index",
        )
    )


def _other_files(folder: Path, read: list[str]) -> dict[str, str]:
    """Files of weights that are not read; two whole models in one folder are an error."""
    stored = [name for name in _names(folder) if name.endswith(".safetensors")]
    others = [name for name in stored if name not in read]
    if SINGLE in others:
        raise CheckpointError(
            lines(
                f"folder {str(folder)!r} has {SINGLE} and an {INDEX} that doesn't name it",
                "expected one model",
                "remove one of the two",
            )
        )
    why = f"{INDEX} doesn't name it" if SINGLE not in read else f"{SINGLE} is the model"
    return dict.fromkeys(others, why)
