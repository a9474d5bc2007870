"""Tokenized documents on disk, so that the next run needn't tokenize again.

A corpus is written beside its place and renamed, so one that is there is complete. What is read is
checked all the same: every document has a token to train on, and fits into a sequence.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError, UsageError, cause, lines
from ..files.disk import Disk
from .encoding import Counts, Encoded

_ABOUT = "about.json"
_DTYPES = {"tokens": np.dtype("<u4"), "trained": np.dtype("?"), "offsets": np.dtype("<i8")}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenized documents, mapped from their files.

    Attributes:
        lengths: `[N]` tokens of each.
        fingerprint: names the data, the tokenizer and how the one became tokens by the other.
        counts: what was done with records on the way.
    """

    lengths: NDArray[np.int64]
    fingerprint: str
    counts: Counts
    _tokens: NDArray[Any]
    _trained: NDArray[Any]
    _offsets: NDArray[np.int64]

    @property
    def token_count(self) -> int:
        return int(self._offsets[-1])

    @property
    def trained_count(self) -> int:
        """Tokens that are trained on."""
        return int(np.count_nonzero(self._trained))

    def check(self, vocab: int) -> None:
        """Raise `UsageError` unless every token is one of a model's."""
        largest = int(self._tokens.max())
        if largest >= vocab:
            raise UsageError(
                lines(
                    f"the tokenizer gives the token id {largest}",
                    f"expected 0 to {vocab - 1}, the model's vocabulary",
                    "use the model's own tokenizer",
                )
            )

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Token ids and loss mask of a document."""
        here = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        return self._tokens[here], self._trained[here]


def is_written(folder: Path) -> bool:
    """Whether a folder holds a corpus."""
    return (folder / _ABOUT).is_file()


@dataclass(kw_only=True)
class Draft:
    """Documents that are to be written, five bytes a token."""

    tokens: list[NDArray[Any]] = field(default_factory=list)
    trained: list[NDArray[Any]] = field(default_factory=list)

    def add(self, document: Encoded) -> None:
        """Take one more document."""
        self.tokens.append(np.asarray(document.ids, _DTYPES["tokens"]))
        self.trained.append(np.asarray(document.trained, _DTYPES["trained"]))


def write_corpus(folder: Path, draft: Draft, counts: Counts) -> None:
    """Write documents into a new folder; any `OSError` is raised.

    Where another run has written the same meanwhile, that one stays.
    """
    arrays = {
        "tokens": np.concatenate(draft.tokens),
        "trained": np.concatenate(draft.trained),
        "offsets": np.cumsum([0, *map(len, draft.tokens)]),
    }
    about = {
        "documents": len(draft.tokens),
        "tokens": len(arrays["tokens"]),
        "counts": asdict(counts),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    made, disk = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent)), Disk()
    try:
        for name, array in arrays.items():
            disk.write(made / f"{name}.bin", array.astype(_DTYPES[name]).tobytes())
        disk.write(made / _ABOUT, json.dumps(about).encode())
        disk.sync_folder(made)
        try:
            disk.rename(made, folder)
            disk.sync_folder(folder.parent)
        except OSError:
            if not is_written(folder):
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_corpus(folder: Path, fingerprint: str, seq_len: int) -> Corpus:
    """A corpus that was written for sequences of so many tokens.

    Raises:
        RunError: it is damaged.
    """
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        arrays = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in _DTYPES.items()
        }
        offsets = np.asarray(arrays["offsets"])
        found = (
            len(offsets) - 1,
            len(arrays["tokens"]),
            len(arrays["trained"]),
            int(offsets[-1]),
        )
        wanted = (about["documents"], about["tokens"], about["tokens"], about["tokens"])
        counts = Counts(**about["counts"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(folder, cause(error)) from None
    if found != wanted:
        raise _damaged(folder, "files of the wrong length")
    lengths = np.diff(offsets)
    if offsets[0] or lengths.min() < 2 or lengths.max() > seq_len:
        raise _damaged(
            folder,
            f"documents of {lengths.min()} to {lengths.max()} tokens, expected 2 to {seq_len}",
        )
    trained = np.array(arrays["trained"])
    trained[offsets[:-1]] = False  # nothing stands before a document's first token
    if not np.logical_or.reduceat(trained, offsets[:-1]).all():
        raise _damaged(folder, "a document has no token to train on")
    return Corpus(
        lengths=lengths,
        fingerprint=fingerprint,
        counts=counts,
        _tokens=arrays["tokens"],
        _trained=arrays["trained"],
        _offsets=offsets,
    )


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(
        lines(f"the tokenized data in {str(folder)!r} are damaged: {why}", "remove that folder")
    )
