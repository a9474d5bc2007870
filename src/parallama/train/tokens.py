"""Data sources into a corpus of tokenized documents, from the cache if they were tokenized before.

The cache's name is the hash of all that decides its content: data, tokenizer, chat template,
lengths, and the version of `encoding`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError, UsageError, cause, lines
from ..files.chat_template import renderer_of
from .corpus import Corpus, Draft, is_written, read_corpus, write_corpus
from .data_sources import DataSource, open_source
from .encoding import Counts, TooLong, encode, fitted
from .records import DataError

VERSION = 1
"""Of what `encoding` makes of a record. Another number makes every cache anew."""
Progress = Callable[[int, int], None]


def prepare(
    sources: Sequence[str],
    tokenizer: Any | None,
    *,
    seq_len: int,
    too_long: TooLong = "error",
    cache: Path,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenized data, from the cache if they were tokenized before.

    Args:
        sources: see `data_sources.open_source`.
        tokenizer: of transformers, a fast one.
        seq_len: most tokens of a document. A longer text becomes several documents; conversations
            and completions are treated as `too_long` says.
        cache: folder for tokenized data.
        progress: called with bytes (or records) done and all of them.

    Raises:
        DataError: see `records`; or a record is too long, or nothing of it is trained on.
        UsageError: the model has no tokenizer, or a conversation has no chat template.
        RunError: the cache can't be written, or is damaged.
    """
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            lines("the model has no tokenizer.json", "expected one: training data are text")
        )
    opened = [open_source(source) for source in sources]
    key = _fingerprint(opened, tokenizer, seq_len, too_long)
    folder = cache.expanduser() / key
    if not is_written(folder):
        draft, counts = _encode_all(opened, tokenizer, seq_len, too_long, progress)
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


def _fingerprint(
    sources: Sequence[DataSource], tokenizer: Any, seq_len: int, too_long: TooLong
) -> str:
    hashed = hashlib.sha256()
    about = [
        VERSION,
        seq_len,
        too_long,
        getattr(tokenizer, "chat_template", None),
        tokenizer.eos_token_id,
        tokenizer.backend_tokenizer.to_str(),
    ]
    hashed.update(json.dumps(about).encode())
    for source in sources:
        source.update(hashed)
    return hashed.hexdigest()[:32]


def _encode_all(
    sources: Sequence[DataSource],
    tokenizer: Any,
    seq_len: int,
    too_long: TooLong,
    progress: Progress | None,
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
        for record, done in source:
            encoded = encode(record, tokenizer, renderer)
            for document in fitted(record, encoded, seq_len, too_long, counts):
                draft.add(document)
            if progress is not None:
                progress(before + done, total)
        before += source.size
    if progress is not None:
        progress(total, total)
    if not draft.tokens:
        raise DataError(
            lines(
                f"the data have no token to train on ({counts.dropped} records were dropped as too "
                "long)",
                "expected at least one",
            )
        )
    return draft, counts
