"""Files of training data, as rows: JSONL, arrays of JSON, text. Pure.

Every row says where it came from. What is no row is an error with file and line.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import text_files
from ..errors import ParallamaError, cause, lines, shown
from .records import DataError, bad
from .row_forms import FORMS

SHIPPED = {"shipped:chat": "chat.jsonl", "shipped:text": "constitution.txt"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt")
_PACKED = ".gz"
_OTHERS = (".parquet", ".arrow", ".csv", ".tsv")
"""What the package `datasets` reads."""
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANK = b" \t\r\n"
_HUB = re.compile(r"(https?://[\w.-]+/datasets/)?([\w.-]+/[\w.-]+)/?")
"""What may be a data set of the hub: its address, or its name."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of data.

    Attributes:
        document: what it says, decoded.
        where: file and line.
        read: how much of the source was read by then.
    """

    document: Any
    where: str
    read: int


def find_files(source: str) -> list[Path]:
    """The files of a data source, in order.

    Args:
        source: a file, a folder of them (with folders within), a pattern as `data/*.jsonl`, or a
            name of `SHIPPED`.

    Raises:
        DataError: it is not there, or holds no such file.
    """
    if source in SHIPPED:
        return [Path(str(files("parallama").joinpath("data", SHIPPED[source])))]
    path = Path(source).expanduser()
    endings = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    try:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            found = [file for file in inside if _is_ours(file) and not _is_hidden(file, path)]
            if not found:
                raise DataError(
                    lines(
                        f"data folder {shown(source)} has no files ending in {endings}",
                        "expected at least one",
                        _remedy(source, inside),
                    )
                )
            return found
        if not path.is_file() and glob.has_magic(source):
            matching = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - or absolute
            found = [file for file in map(Path, matching) if file.is_file() and _is_ours(file)]
            if found:
                return found
        if not path.is_file():
            known, hub = ", ".join(SHIPPED), _HUB.fullmatch(source)
            raise DataError(
                lines(
                    f"data {shown(source, 300)} is not there",
                    f"expected a {endings} file, a folder of them, {known}, or hf:NAME",
                    f"'hf:{hub[2]}' reads a data set of the hub" if hub is not None else "",
                )
            )
    except (OSError, ValueError) as error:
        if isinstance(error, ParallamaError):
            raise
        raise DataError(
            lines(
                f"data {shown(source)} cannot be looked at: {cause(error)}",
                "expected a file or folder",
            )
        ) from None
    if not _is_ours(path):
        raise DataError(
            lines(
                f"data file {shown(source, 300)} is of no known kind",
                f"expected a name ending in {endings}",
                _remedy(str(path.parent), [path]),
            )
        )
    return [path]


def _kind(path: Path) -> str:
    """A file's ending, without what packs it."""
    return Path(path.stem if path.suffix == _PACKED else path.name).suffix


def _is_ours(path: Path) -> bool:
    return _kind(path) in SUFFIXES


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether a file is hidden, or in a hidden folder, as those that downloads leave."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _remedy(folder: str, inside: list[Path]) -> str:
    other = next((file for file in inside if _kind(file) in _OTHERS), None)
    return "" if other is None else f"'hf:{folder}' reads a folder of {_kind(other)} files"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, each with how many of its bytes were read by then.

    What a JSON file holds decides how it is read: an array of rows, or a row a line. Empty lines
    and byte order marks are passed over.

    Raises:
        DataError: the file can't be read or is empty, or a line is not JSON.
    """
    try:
        if _kind(path) == ".txt":
            content = _content(path)
            if not content.strip():
                raise bad(str(path), "it is empty", "some text")
            document = {"text": _decoded(content, str(path))}
            yield Row(document=document, where=str(path), read=path.stat().st_size)
        elif _first_byte(path) == b"[":
            yield from _array(path)
        else:
            yield from _lines(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise bad(str(path), f"it is no whole gzip file: {cause(error)}", "a .gz file") from None
    except OSError as error:
        raise DataError(
            lines(
                f"data file {str(path)!r} cannot be read: {error.strerror}",
                "expected a readable file",
            )
        ) from None


def _open(path: Path) -> Any:
    """The bytes of a file as UTF-8, whatever packs them; UTF-16 is what Windows' shell writes."""
    opened: Callable[[], Any] = partial(path.open, "rb")
    if path.suffix == _PACKED:
        opened = partial(gzip.open, path, "rb")
    with opened() as stream:
        begin: bytes = stream.read(2)
        if begin in _WIDE:
            return io.BytesIO(_decoded(begin + stream.read(), str(path)).encode())
    return opened()


def _content(path: Path) -> bytes:
    with _open(path) as stream:
        content: bytes = stream.read()
    return content


def _first_byte(path: Path) -> bytes:
    """The first byte that says something."""
    with _open(path) as stream:
        piece: bytes = stream.read(4096)
        while piece:
            said = piece.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
            if said:
                return said[:1]
            piece = stream.read(4096)
    return b""


def _lines(path: Path) -> Iterator[Row]:
    """A row a line."""
    empty, done, size = True, 0, path.stat().st_size
    # As bytes: only \n ends a line of JSONL, not the other characters that Python splits at.
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            done += len(line)
            if line.removeprefix(codecs.BOM_UTF8).strip():
                empty = False
                where = f"{path}:{number}"
                yield Row(document=_json(line, where), where=where, read=min(done, size))
    if empty:
        raise bad(str(path), "it is empty", f"a line for each record, as {FORMS}")


def _json(line: bytes, where: str) -> Any:
    try:
        return json.loads(_decoded(line, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise bad(
            where,
            f"it is not JSON: {cause(error)}",
            f"one JSON object a line, as {FORMS}; or an array of them",
        ) from None


def _array(path: Path) -> Iterator[Row]:
    """The members of an array, decoded one at a time."""
    content, size = _content(path), path.stat().st_size
    text = _decoded(content, str(path))
    decoder, at, number = json.JSONDecoder(), text.index("[") + 1, 0
    try:
        while True:
            at = _skipped(text, at)
            if not number and text[at] == "]":
                raise bad(str(path), "it is empty", f"an array of records, as {FORMS}")
            document, at = decoder.raw_decode(text, at)
            number += 1
            yield Row(document=document, where=f"{path} row {number}", read=size * at // len(text))
            at = _skipped(text, at)
            if text[at] not in ",]":
                raise ValueError(f"expected , or ] at character {at}")
            if text[at] == "]":
                break
            at += 1
        if text[at + 1 :].strip():
            raise ValueError(f"more after the array, at character {at + 1}")
    except (ValueError, IndexError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        what = "it ends early" if isinstance(error, IndexError) else cause(error)
        after = f"row {number}" if number else "its beginning"
        raise bad(
            str(path), f"it is not JSON after {after}: {what}", f"an array of records, as {FORMS}"
        ) from None


def _skipped(text: str, at: int) -> int:
    """Where the next character is that says something."""
    while text[at] in " \t\r\n":
        at += 1
    return at


def _decoded(content: bytes, where: str) -> str:
    try:
        return text_files.decode(content)
    except UnicodeDecodeError:
        raise bad(where, "it is not UTF-8", "UTF-8 text") from None
