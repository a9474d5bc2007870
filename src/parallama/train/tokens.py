"""Records into token ids with their loss mask, kept on disk so that the next run needn't do it again.

The cache's name is the hash of all that decides about its content: data, tokenizer, chat template, lengths, and this module's version. It is written beside its place and
renamed, so a cache that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError, UsageError, cause, lines
from ..files.chat_template import Renderer, renderer_of
from ..files.disk import Disk
from .records import Chat, Completion, DataError, Record, Text, find_files, read_records

VERSION = 1
"""Of what `encode` makes; another number makes every cache anew."""
TooLong = Literal["error", "drop", "truncate"]
Progress = Callable[[int, int], None]
_FILES = {"tokens": np.dtype("<u4"), "trained": np.dtype("?"), "offsets": np.dtype("<i8")}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One document: token ids, and which of them are trained on."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenized documents, mapped from the cache.

    Attributes:
        lengths: `[N]` tokens of each.
        fingerprint: names the data, the tokenizer and how the one became tokens by the other.
        dropped: records left out for their length.
        truncated: records cut for it.
    """

    lengths: NDArray[np.int64]
    fingerprint: str
    dropped: int
    truncated: int
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


def prepare(
    sources: Sequence[str],
    tokenizer: Any | None,
    *,
    seq_len: int,
    too_long: TooLong = "error",
    cache: Path,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenized data, from the cache if it was tokenized before.

    Args:
        sources: see `records.find_files`; `hf:NAME[:SPLIT]` is a data set of Hugging Face's `datasets`.
        tokenizer: of transformers, a fast one.
        seq_len: most tokens of a document. Texts longer than that become several documents; conversations and completions are treated as `too_long` says.
        cache: folder for tokenized data.
        progress: called with bytes (or records) done and all of them.

    Raises:
        DataError: see `records`; or a record is too long, or nothing of it is trained on.
        UsageError: the model has no tokenizer, or conversations are to be tokenized without a chat template.
        RunError: the cache can't be written.
    """
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            lines("the model has no tokenizer.json", "expected one: training data are text")
        )
    inputs = [
        _hugging_face(source) if source.startswith("hf:") else _FileInput(find_files(source))
        for source in sources
    ]
    key = _fingerprint(inputs, tokenizer, seq_len, too_long)
    folder = cache.expanduser() / key
    if not (folder / "about.json").is_file():
        try:
            _write(folder, _encode_all(inputs, tokenizer, seq_len, too_long, progress))
        except OSError as error:
            raise RunError(
                lines(
                    f"tokenized data cannot be written to {str(folder)!r}: {cause(error)}",
                    "expected a folder with room, by the key 'cache'",
                )
            ) from None
    return _open(folder, key)


def encode(record: Record, tokenizer: Any, renderer: Renderer | None = None) -> Encoded:
    """A record's token ids and loss mask, of any length.

    Args:
        renderer: of the tokenizer's chat template, for conversations.

    Raises:
        DataError: nothing of it is trained on, or the chat template doesn't say where an answer begins and ends.
        CheckpointError: the chat template is broken, or takes too long.
    """
    if isinstance(record, Text):
        ids = [*tokenizer(record.text, verbose=False)["input_ids"], *_eos(tokenizer)]
        return Encoded(ids=ids, trained=[True] * len(ids))
    if isinstance(record, Completion):
        encoded = _with_spans(
            tokenizer,
            record.prompt + record.completion,
            [(len(record.prompt), len(record.prompt + record.completion))],
            special=True,
        )
        eos = _eos(tokenizer)
        encoded = Encoded(
            ids=[*encoded.ids, *eos], trained=[*encoded.trained, *(True for _ in eos)]
        )
    else:
        assert renderer is not None
        encoded = _chat(record, tokenizer, renderer)
    if not any(encoded.trained[1:]):
        raise DataError(
            lines(
                f"data {record.where}: none of its {len(encoded.ids)} tokens is trained on",
                "expected an answer with text in it",
            )
        )
    return encoded


def _chat(record: Chat, tokenizer: Any, renderer: Renderer) -> Encoded:
    """By the chat template; trained on are the assistant's words and the mark that ends its turn."""
    messages = record.messages
    try:
        whole = _rendered(renderer, messages)
        spans = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                before = (
                    renderer.render(messages[:at]) if at else _rendered_opening(renderer, message)
                )
                after = _rendered(renderer, messages[: at + 1])
                if not (whole.startswith(after) and after.startswith(before)):
                    raise DataError(
                        lines(
                            f"data {record.where}: the chat template writes message {at + 1} differently when others follow it",
                            "expected a template that only appends",
                            "give the conversation as {'prompt': ..., 'completion': ...}",
                        )
                    )
                # What the template puts behind the end mark (a line break) no model ever has to say.
                spans.append((len(before), max(len(after.rstrip()), len(before))))
    except DataError:
        raise
    except UsageError as error:
        refused = str(error).partition(" refuses the messages: ")[2]
        raise DataError(
            lines(
                f"data {record.where}: the chat template refuses it: {refused}",
                "expected roles in an order that it takes",
            )
        ) from None
    return _with_spans(tokenizer, whole, spans, special=False)


def _rendered(renderer: Renderer, messages: Sequence[dict[str, str]]) -> str:
    return renderer.render(messages, add_generation_prompt=False)


def _rendered_opening(renderer: Renderer, message: dict[str, str]) -> str:
    """What stands before an assistant's words that open a conversation, for which templates have no prompt."""
    whole = _rendered(renderer, [message])
    return whole[: whole.find(message["content"])] if message["content"] in whole else whole


def _with_spans(
    tokenizer: Any, text: str, spans: list[tuple[int, int]], *, special: bool
) -> Encoded:
    """Tokens of a text; trained on are those that lie within the spans, whole."""
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    trained = [
        any(start <= first and last <= end for start, end in spans) and first < last
        for first, last in encoded["offset_mapping"]
    ]
    return Encoded(ids=list(encoded["input_ids"]), trained=trained)


def _eos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


@dataclass
class _Counts:
    dropped: int = 0
    truncated: int = 0


def _fitted(
    record: Record, encoded: Encoded, seq_len: int, too_long: TooLong, counts: _Counts
) -> Iterator[Encoded]:
    """A document as one or more of at most `seq_len` tokens, or none."""
    length = len(encoded.ids)
    if length <= seq_len:
        yield encoded
    elif isinstance(record, Text):
        # Each piece begins with the last token of the one before, so that every token but the first is predicted once.
        for start in range(0, length - 1, seq_len - 1):
            yield Encoded(
                ids=encoded.ids[start : start + seq_len],
                trained=encoded.trained[start : start + seq_len],
            )
    elif too_long == "truncate" and any(encoded.trained[1:seq_len]):
        counts.truncated += 1
        yield Encoded(ids=encoded.ids[:seq_len], trained=encoded.trained[:seq_len])
    elif too_long == "error":
        raise DataError(
            lines(
                f"data {record.where}: it has {length} tokens, and seq_len is {seq_len}",
                "raise seq_len, or set too_long to drop or truncate",
            )
        )
    else:
        counts.dropped += 1


@dataclass
class _FileInput:
    """Data from files."""

    paths: list[Path]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def update(self, hashed: Any) -> None:
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

    def __iter__(self) -> Iterator[tuple[Record, int]]:
        """Records, each with how many bytes were read when it came."""
        done = 0
        for path in self.paths:
            for record, read in read_records(path):
                yield record, done + read
            done += path.stat().st_size


@dataclass
class _HubInput:
    """A data set of Hugging Face's `datasets`."""

    rows: Any
    name: str

    @property
    def size(self) -> int:
        return len(self.rows)

    def update(self, hashed: Any) -> None:
        hashed.update(str(self.rows._fingerprint).encode())

    def __iter__(self) -> Iterator[tuple[Record, int]]:
        from .records import parse

        for number, row in enumerate(self.rows, 1):
            yield parse(row, f"{self.name} row {number}"), number


def _hugging_face(source: str) -> _HubInput:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            lines(
                f"data {source!r} needs the package 'datasets'", "pip install 'parallama[datasets]'"
            )
        ) from None
    name, _, split = source.removeprefix("hf:").partition(":")
    try:
        saved = Path(name, "state.json").is_file()
        rows = (
            datasets.load_from_disk(name)
            if saved
            else datasets.load_dataset(name, split=split or "train")
        )
    except Exception as error:  # of many kinds, network ones among them
        raise DataError(
            lines(
                f"data {source!r} cannot be had: {type(error).__name__}: {cause(error, 120)}",
                "expected hf:NAME:SPLIT, or a file",
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
    return _HubInput(rows, source)


def _fingerprint(
    inputs: Sequence[_FileInput | _HubInput], tokenizer: Any, seq_len: int, too_long: TooLong
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
    for source in inputs:
        source.update(hashed)
    return hashed.hexdigest()[:32]


def _encode_all(
    inputs: Sequence[_FileInput | _HubInput],
    tokenizer: Any,
    seq_len: int,
    too_long: TooLong,
    progress: Progress | None,
) -> tuple[dict[str, NDArray[Any]], _Counts]:
    counts = _Counts()
    total, before = sum(source.size for source in inputs), 0
    tokens: list[NDArray[Any]] = []
    trained: list[NDArray[Any]] = []
    origin = repr(tokenizer.name_or_path) if tokenizer.name_or_path else "the model"
    renderer = renderer_of(tokenizer, origin) if getattr(tokenizer, "chat_template", None) else None
    for source in inputs:
        for record, done in source:
            if isinstance(record, Chat) and renderer is None:
                raise UsageError(
                    lines(
                        f"data {record.where} is a conversation, but the model has no chat template",
                        "expected prompt and completion, or text",
                    )
                )
            for piece in _fitted(
                record, encode(record, tokenizer, renderer), seq_len, too_long, counts
            ):
                tokens.append(np.asarray(piece.ids, _FILES["tokens"]))
                trained.append(np.asarray(piece.trained, _FILES["trained"]))
            if progress is not None:
                progress(before + done, total)
        before += source.size
    if progress is not None:
        progress(total, total)
    if not any(mask[1:].any() for mask in trained):
        raise DataError(
            lines(
                f"the data have no token to train on ({counts.dropped} records were dropped as too long)",
                "expected at least one",
            )
        )
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])]).astype(
        _FILES["offsets"]
    )
    return {
        "tokens": np.concatenate(tokens),
        "trained": np.concatenate(trained),
        "offsets": offsets,
    }, counts


def _write(folder: Path, encoded: tuple[dict[str, NDArray[Any]], _Counts]) -> None:
    arrays, counts = encoded
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        disk = Disk()
        for name, array in arrays.items():
            disk.write(made / f"{name}.bin", array.tobytes())
        about = {
            "documents": len(arrays["offsets"]) - 1,
            "tokens": len(arrays["tokens"]),
            "dropped": counts.dropped,
            "truncated": counts.truncated,
        }
        disk.write(made / "about.json", json.dumps(about).encode())
        disk.sync_folder(made)
        try:
            disk.rename(made, folder)
            disk.sync_folder(folder.parent)
        except OSError:
            if not (
                folder / "about.json"
            ).is_file():  # another run has made the same meanwhile: as good
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _open(folder: Path, key: str) -> Corpus:
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        arrays = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in _FILES.items()
        }
        sizes = (
            len(arrays["offsets"]) - 1,
            len(arrays["tokens"]),
            len(arrays["trained"]),
            int(arrays["offsets"][-1]),
        )
        whole = sizes == (about["documents"], about["tokens"], about["tokens"], about["tokens"])
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            lines(
                f"the tokenized data in {str(folder)!r} are damaged: {cause(error)}",
                "remove that folder",
            )
        ) from None
    if not whole:
        raise RunError(
            lines(
                f"the tokenized data in {str(folder)!r} are damaged: files of the wrong length",
                "remove that folder",
            )
        )
    offsets = np.asarray(arrays["offsets"])
    return Corpus(
        lengths=np.diff(offsets),
        fingerprint=key,
        dropped=about["dropped"],
        truncated=about["truncated"],
        _tokens=arrays["tokens"],
        _trained=arrays["trained"],
        _offsets=offsets,
    )
