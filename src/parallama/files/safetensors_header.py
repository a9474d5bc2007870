"""The header of a safetensors file, checked against its size before a tensor is read. Pure.

A file is eight bytes with the header's length, the header (a JSON object: tensor name -> dtype,
shape, offsets), and the tensors' bytes, which must have no gap and no overlap. See
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError, cause, lines, shown

LONGEST_BYTES = 100_000_000
"""The longest header that safetensors itself reads."""
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
    ),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Every dtype of the format -> bits of a number."""
_MOST_DIMS = 8
_SPACE = rb"[ \t\r\n]*+"
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_OPENED = re.compile(rb"\{" + _SPACE)
_KEY = re.compile(rb"(" + _STRING + rb")" + _SPACE + rb":" + _SPACE)
_TEXT = re.compile(_STRING)
_ENTRY = re.compile(rb"\{[^{}]{0,4096}+\}")
_NEXT = re.compile(_SPACE + rb"([,}])" + _SPACE)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        name: as stored.
        dtype: in the format's words, as `BF16`.
        start, end: its first byte in the file, and the one behind its last.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read(file: Path, most: int) -> dict[str, StoredTensor]:
    """The tensors of a file, by name, in the order of their bytes.

    Args:
        file: a regular file.
        most: refuse a header that names more tensors.

    Raises:
        CheckpointError: the file is damaged, with the tensor's name where there is one.
    """
    header, size = _header(file)
    return _placed(file, _parse(file, header, most), 8 + len(header), size)


def _damaged(file: Path, what: str) -> NoReturn:
    raise CheckpointError(
        lines(
            f"{file.name} is damaged: {what}",
            "expected a whole safetensors file; download it again",
        )
    )


def _header(file: Path) -> tuple[bytes, int]:
    """The header's bytes and the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                _damaged(file, f"it has {len(start)} bytes, and the header's length alone takes 8")
            length = int.from_bytes(start, "little")
            if length > size - 8:
                _damaged(file, f"its header should have {length} bytes, and {size - 8} are left")
            if not 2 <= length <= LONGEST_BYTES:
                _damaged(
                    file,
                    f"its header should have {length} bytes, "
                    f"which is not between 2 and {LONGEST_BYTES}",
                )
            header = stream.read(length)
    except OSError as error:
        _damaged(file, error.strerror or cause(error))
    if len(header) < length:
        _damaged(file, f"its header should have {length} bytes, and {len(header)} are there")
    return header, size


def _parse(file: Path, header: bytes, most: int) -> list[tuple[str, dict[str, Any]]]:
    """What the header says of each tensor, not judged yet.

    It is scanned piece by piece, so that a hostile one takes no more memory than it has bytes.
    """
    _check_utf8(file, header)
    found: list[tuple[str, dict[str, Any]]] = []
    seen: set[str] = set()
    opened = _OPENED.match(header)
    if opened is None:
        _damaged(file, "its header is no JSON object")
    at = opened.end()
    if header[at : at + 1] == b"}":
        at += 1
    else:
        while True:
            key = _KEY.match(header, at)
            if key is None:
                _damaged(file, f"its header is no JSON: expected a name at byte {8 + at}")
            name = _text(file, key[1])
            if name in seen:
                _damaged(file, f"its header names {shown(name)} twice")
            seen.add(name)
            if name == "__metadata__":
                at = _skip_metadata(file, header, key.end())
            else:
                if len(found) >= most:
                    _damaged(
                        file,
                        f"its header names more than {most} tensors, "
                        "far more than the config explains",
                    )
                entry = _ENTRY.match(header, key.end())
                if entry is None:
                    _damaged(
                        file,
                        f"its header has no dtype, shape and data_offsets for tensor {shown(name)}",
                    )
                found.append((name, _fields(file, name, entry[0])))
                at = entry.end()
            at, more = _after(file, header, at)
            if not more:
                break
    if header[at:].strip(b" \t\r\n"):
        _damaged(file, f"its header goes on behind its end, at byte {8 + at}")
    return found


def _after(file: Path, header: bytes, at: int) -> tuple[int, bool]:
    """Where the next member of an object starts, and whether there is one."""
    following = _NEXT.match(header, at)
    if following is None:
        _damaged(file, f"its header is no JSON: expected a comma or a brace at byte {8 + at}")
    return following.end(), following[1] == b","


def _skip_metadata(file: Path, header: bytes, at: int) -> int:
    """Where the metadata ends: an object of texts, which nothing here needs."""
    opened = _OPENED.match(header, at)
    if opened is None:
        _damaged(file, "its __metadata__ is no object of texts")
    at = opened.end()
    if header[at : at + 1] == b"}":
        return at + 1
    while True:
        key = _KEY.match(header, at)
        text = None if key is None else _TEXT.match(header, key.end())
        if text is None:
            _damaged(file, f"its __metadata__ is no object of texts: see byte {8 + at}")
        at, more = _after(file, header, text.end())
        if not more:
            return at


def _check_utf8(file: Path, header: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(header), 1 << 20):
            decoder.decode(header[start : start + (1 << 20)])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        _damaged(file, "its header is no UTF-8 text")


def _text(file: Path, quoted: bytes) -> str:
    if len(quoted) > 4096:
        _damaged(file, f"its header has a name of {len(quoted)} bytes")
    text: str = json.loads(quoted)
    return text


class _Repeated(ValueError):
    """A field that an entry has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _Repeated
    return fields


def _fields(file: Path, name: str, entry: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(entry, object_pairs_hook=_once)
    except _Repeated:
        _damaged(file, f"tensor {shown(name)} has a field twice")
    except (ValueError, RecursionError) as error:
        _damaged(file, f"its header is no JSON at tensor {shown(name)}: {cause(error)}")
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        _damaged(
            file,
            f"tensor {shown(name)} has the fields {shown(sorted(fields))}, "
            "not dtype, shape and data_offsets",
        )
    return fields


def _placed(
    file: Path, entries: list[tuple[str, dict[str, Any]]], data_start: int, size: int
) -> dict[str, StoredTensor]:
    """The tensors, each checked against its size, and all together against the file's."""
    found = [_tensor(file, name, fields, data_start, size) for name, fields in entries]
    found.sort(key=lambda tensor: (tensor.start, tensor.end))
    covered, before = data_start, "the header"
    for tensor in found:
        name = shown(tensor.name)
        if tensor.start > covered:
            gap = tensor.start - covered
            _damaged(file, f"{gap} bytes before tensor {name} belong to no tensor")
        if tensor.start < covered:
            _damaged(file, f"tensor {name} overlaps {before}")
        covered, before = tensor.end, name
    if covered < size:
        _damaged(file, f"{size - covered} bytes behind its last tensor belong to none")
    return {tensor.name: tensor for tensor in found}


def _tensor(
    file: Path, name: str, fields: dict[str, Any], data_start: int, size: int
) -> StoredTensor:
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    which = f"tensor {shown(name)}"
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _damaged(file, f"{which} is of the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMS:
        _damaged(file, f"{which} has the shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _damaged(file, f"{which} has the offsets {shown(offsets)}")
    start, end = offsets
    if end < start or data_start + end > size:
        _damaged(
            file,
            f"{which} is at bytes {shown(start)} to {shown(end)}, "
            f"and there are {size - data_start}",
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - start):
        _damaged(file, f"{which} of shape {shown(shape)} and dtype {dtype} has {end - start} bytes")
    return StoredTensor(
        file=file,
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + start,
        end=data_start + end,
    )


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
