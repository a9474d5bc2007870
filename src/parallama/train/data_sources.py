"""Where training data come from: files, or a data set of Hugging Face's `datasets`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import UsageError, cause, lines
from .data_files import Row, find_files, read_rows
from .records import DataError


class DataSource(Protocol):
    """Rows, and what names their content."""

    @property
    def size(self) -> int:
        """How much there is to read: bytes or rows."""
        ...

    def update(self, hashed: Any) -> None:
        """Add the content to a hash."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """Rows, each with how much was read by then."""
        ...


def open_source(source: str) -> DataSource:
    """A data source by its name: `hf:NAME[:CONFIG][:SPLIT]`, or as in `data_files.find_files`.

    Raises:
        DataError: it is not there, or holds no records.
        UsageError: the package that reads it is not installed.
    """
    return _hugging_face(source) if source.startswith("hf:") else _Files(find_files(source))


@dataclass
class _Files:
    paths: list[Path]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def update(self, hashed: Any) -> None:
        """See `DataSource`."""
        for path in self.paths:
            try:
                with path.open("rb") as stream:
                    hashed.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(
                    lines(
                        f"data file {str(path)!r} cannot be read: {error.strerror}",
                        "expected a readable file",
                    )
                ) from None

    def __iter__(self) -> Iterator[Row]:
        done = 0
        for path in self.paths:
            for row in read_rows(path):
                yield replace(row, read=done + row.read)
            done += path.stat().st_size


@dataclass
class _HubRows:
    rows: Any
    name: str

    @property
    def size(self) -> int:
        return len(self.rows)

    def update(self, hashed: Any) -> None:
        """See `DataSource`."""
        hashed.update(str(self.rows._fingerprint).encode())

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.rows, 1):
            yield Row(document=row, where=f"{self.name} row {number}", read=number)


def _parts(source: str) -> tuple[str, str | None, str]:
    """Name, config and split of `hf:NAME[:CONFIG][:SPLIT]`; a split may be `train[:10%]`."""
    name, *rest = re.split(r":(?![^\[]*\])", source.removeprefix("hf:"), maxsplit=2)
    split = rest.pop() if rest else ""
    return name, rest[0] if rest else None, split or "train"


def _hugging_face(source: str) -> _HubRows:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            lines(
                f"data {source!r} needs the package 'datasets'", "pip install 'parallama[datasets]'"
            )
        ) from None
    name, config, split = _parts(source)
    try:
        if Path(name, "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of many kinds, network ones among them
        raise DataError(
            lines(
                f"data {source!r} cannot be had: {type(error).__name__}: {cause(error, 120)}",
                "expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, or a file",
            )
        ) from None
    if not hasattr(rows, "_fingerprint"):
        raise DataError(
            lines(
                f"data {source!r} holds several splits", f"expected one of them, as {source}:train"
            )
        )
    if not len(rows):
        raise DataError(lines(f"data {source!r}: it is empty", "expected at least one record"))
    return _HubRows(rows, source)
