"""Data sources into a corpus of tokenized documents, from the cache if they were tokenized before.

The cache's name is the hash of all that decides its content: data, tokenizer, chat template,
lengths, and the version of `encoding`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError, UsageError, cause, lines
from ..files.chat_template import Renderer, renderer_of
from .corpus import Corpus, Draft, is_written, read_corpus, write_corpus
from .data_files import Row
from .data_sources import DataSource, open_source
from .encoding import BadRows, Counts, Encoded, TooLong, encode, fitted
from .records import DataError
from .row_forms import parse

VERSION = 2
"""Of what `encoding` makes of a record. Another number makes every cache anew."""
Progress = Callable[[int, int], None]


def prepare(
    sources: Sequence[str],
    tokenizer: Any | None,
    *,
    seq_len: int,
    too_long: TooLong = "error",
    split_answers: bool = False,
    bad_rows: BadRows = "error",
    cache: Path,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenized data, from the cache if they were tokenized before.

    Args:
        sources: see `data_sources.open_source`.
        tokenizer: of transformers, a fast one.
        seq_len: most tokens of a document. A longer text becomes several documents; conversations
            and completions are treated as `too_long` says.
        split_answers: see `encoding.encode`.
        bad_rows: what becomes of a row of no known form, or with nothing to train on.
        cache: folder for tokenized data.
        progress: called with bytes (or rows) done and all of them.

    Raises:
        DataError: see `data_files` and `row_forms`; or a record is too long, or nothing of it is
            trained on.
        UsageError: the model has no tokenizer, or a conversation has no chat template.
        RunError: the cache can't be written, or is damaged.
    """
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            lines("the model has no tokenizer.json", "expected one: training data are text")
        )
    opened = [open_source(source) for source in sources]
    how = _How(seq_len=seq_len, too_long=too_long, split_answers=split_answers, bad_rows=bad_rows)
    key = _fingerprint(opened, tokenizer, how)
    folder = cache.expanduser() / key
    if not is_written(folder):
        draft, counts = _encode_all(opened, tokenizer, how, progress)
        try:
            write_corpus(folder, draft, counts)
        except OSError as error:
            raise RunError(
                lines(
                    f"tokenized data cannot be written to {str(folder)!r}: {cause(error)}",
                    "expected a folder with room, by the key 'cache'",
                )
            ) from None
    return read_corpus(folder, key, seq_len)


@dataclass(frozen=True, kw_only=True)
class _How:
    """How rows become documents; see `prepare`."""

    seq_len: int
    too_long: TooLong
    split_answers: bool
    bad_rows: BadRows


def _fingerprint(sources: Sequence[DataSource], tokenizer: Any, how: _How) -> str:
    hashed = hashlib.sha256()
    about = [
        VERSION,
        *astuple(how),
        getattr(tokenizer, "chat_template", None),
        tokenizer.eos_token_id,
        tokenizer.backend_tokenizer.to_str(),
    ]
    hashed.update(json.dumps(about).encode())
    for source in sources:
        source.update(hashed)
    return hashed.hexdigest()[:32]


def _encode_all(
    sources: Sequence[DataSource], tokenizer: Any, how: _How, progress: Progress | None
) -> tuple[Draft, Counts]:
    """Every document of every source.

    Raises:
        DataError: there is none.
    """
    draft, counts = Draft(), Counts()
    total = sum(source.size for source in sources)
    before = 0
    origin = repr(tokenizer.name_or_path) if tokenizer.name_or_path else "the model"
    renderer = renderer_of(tokenizer, origin) if getattr(tokenizer, "chat_template", None) else None
    for source in sources:
        for row in source:
            for document in _documents(row, tokenizer, renderer, how, counts):
                draft.add(document)
            if progress is not None:
                progress(before + row.read, total)
        before += source.size
    if progress is not None:
        progress(total, total)
    if not draft.tokens:
        raise DataError(
            lines(
                f"the data have no token to train on ({counts.dropped} records were dropped as too "
                f"long, {counts.bad} as bad)",
                "expected at least one",
                *counts.notes[:1],
            )
        )
    return draft, counts


def _documents(
    row: Row, tokenizer: Any, renderer: Renderer | None, how: _How, counts: Counts
) -> Iterator[Encoded]:
    try:
        record = parse(row.document, row.where)
        found = encode(record, tokenizer, renderer, split_answers=how.split_answers, counts=counts)
    except DataError as error:
        if how.bad_rows == "error":
            raise
        if not counts.bad:
            counts.note([f"the first row that was dropped as bad: {str(error).splitlines()[0]}"])
        counts.bad += 1
        return
    counts.note(record.notes)
    for encoded in found:
        yield from fitted(record, encoded, how.seq_len, how.too_long, counts)
