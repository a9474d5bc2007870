"""A record into token ids with their loss mask, and into documents that a sequence has room for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from ..errors import UsageError, lines
from ..files.chat_template import Renderer
from .records import Chat, Completion, DataError, Record, Text, bad

TooLong = Literal["error", "drop", "truncate"]
BadRows = Literal["error", "drop"]
_MOST_NOTES = 8


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One document: token ids, and which of them are trained on."""

    ids: list[int]
    trained: list[bool]


@dataclass(kw_only=True)
class Counts:
    """What was done with records, where they were not taken as they are.

    Attributes:
        dropped: left out as too long.
        truncated: cut because of that.
        bad: left out because nothing of them can be trained on.
        rewritten: answers not trained on, since the chat template writes them differently once
            others follow.
        notes: what is to be said of records, each once.
    """

    dropped: int = 0
    truncated: int = 0
    bad: int = 0
    rewritten: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, notes: Iterable[str]) -> None:
        """Take what is to be said, if it is new."""
        for note in notes:
            if note not in self.notes and len(self.notes) < _MOST_NOTES:
                self.notes.append(note)


def encode(
    record: Record,
    tokenizer: Any,
    renderer: Renderer | None = None,
    *,
    split_answers: bool = False,
    counts: Counts | None = None,
) -> list[Encoded]:
    """A record's token ids and loss mask, of any length.

    It is one document, unless each answer of a conversation becomes one.

    Args:
        renderer: of the tokenizer's chat template, for conversations.
        split_answers: a conversation becomes a document for each answer, which ends with it.
        counts: where to count answers that are not trained on.

    Raises:
        DataError: nothing of it is trained on, or the chat template doesn't say where an answer
            begins and ends.
        UsageError: it is a conversation, and there is no chat template.
        CheckpointError: the chat template is broken, or takes too long.
    """
    counts = counts if counts is not None else Counts()
    if isinstance(record, Chat) and renderer is None and record.plain is not None:
        counts.note(["without a chat template, instructions are put into Alpaca's own prompt"])
        record = record.plain
    expected = "an answer with text in it"
    if isinstance(record, Text):
        text = _whole(record.text, record)
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        found = [_ended(Encoded(ids=ids, trained=[True] * len(ids)), tokenizer, counts)]
        expected = "a text of two tokens or more: each is predicted from those before it"
    elif isinstance(record, Completion):
        found = [_completion(record, tokenizer, counts)]
    elif split_answers:
        parts = [
            replace(record, messages=record.messages[: answer + 1], answers=(answer,))
            for answer in record.answers
        ]
        found = [_chat(part, tokenizer, renderer, counts) for part in parts]
    else:
        found = [_chat(record, tokenizer, renderer, counts)]
    for encoded in found:
        if not any(encoded.trained[1:]):
            raise bad(
                record.where,
                f"none of its {len(encoded.ids)} tokens is trained on",
                expected,
            )
    return found


def fitted(
    record: Record, encoded: Encoded, seq_len: int, too_long: TooLong, counts: Counts
) -> Iterator[Encoded]:
    """A document as one or more of at most `seq_len` tokens, or none.

    Raises:
        DataError: it is longer, and `too_long` says that this is an error.
    """
    length = len(encoded.ids)
    if length <= seq_len:
        yield encoded
    elif isinstance(record, Text):
        # A piece begins with the last token of the one before: every token but the first is
        # predicted once.
        for start in range(0, length - 1, seq_len - 1):
            end = start + seq_len
            yield Encoded(ids=encoded.ids[start:end], trained=encoded.trained[start:end])
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


def _ended(found: Encoded, tokenizer: Any, counts: Counts) -> Encoded:
    """A text with one BOS, if the tokenizer puts one there, and one EOS at its end.

    Texts that a chat template has made have their own.
    """
    ids, trained = found.ids, found.trained
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        counts.note(["texts begin with BOS already: the tokenizer's own is left out"])
        ids, trained = ids[1:], trained[1:]
    if eos is None:
        counts.note(["the tokenizer names no EOS: nothing tells where a text ends"])
    elif ids[-1:] != [eos]:
        ids, trained = [*ids, int(eos)], [*trained, True]
    return Encoded(ids=ids, trained=trained)


def _completion(record: Completion, tokenizer: Any, counts: Counts) -> Encoded:
    text = _whole(record.prompt + record.completion, record)
    found = _with_spans(tokenizer, text, [(len(record.prompt), len(text))], special=True)
    return _ended(found, tokenizer, counts)


def _chat(record: Chat, tokenizer: Any, renderer: Renderer | None, counts: Counts) -> Encoded:
    """By the chat template, up to the last answer.

    Trained on are the assistant's words and the mark that ends its turn. An answer that the
    template writes differently once others follow is left out: what stands in the conversation is
    not what a model has to say there.
    """
    if renderer is None:
        raise UsageError(
            lines(
                f"data {record.where} is a conversation, but the model has no chat template",
                "expected prompt and completion, or text",
            )
        )
    turns = _Turns(record=record, renderer=renderer)
    try:
        whole = turns.rendered(record.answers[-1] + 1)
        spans = [turns.span(whole, answer, counts) for answer in record.answers]
    except UsageError as error:
        refused = str(error).partition(" refuses the messages: ")[2]
        raise bad(
            record.where,
            f"the chat template refuses it: {refused}",
            "roles in an order that it takes",
        ) from None
    kept = [span for span in spans if span is not None]
    if not kept:
        raise DataError(
            lines(
                f"data {record.where}: the chat template writes message {record.answers[-1] + 1} "
                "otherwise than it is asked for",
                "expected a template that writes what it wrote before, and then an answer",
                "give the conversation as {'prompt': ..., 'completion': ...}",
            )
        )
    counts.rewritten += len(spans) - len(kept)
    encoded = _with_spans(tokenizer, _whole(whole, record), kept, special=False)
    last = next((at for at in reversed(range(len(encoded.ids))) if encoded.trained[at]), None)
    if last is not None and encoded.ids[last] not in _marks(tokenizer):
        counts.note(
            ["the chat template ends no answer with a special token: a model may not learn to stop"]
        )
    return encoded


@dataclass(frozen=True, kw_only=True)
class _Turns:
    """A conversation by its chat template."""

    record: Chat
    renderer: Renderer

    def rendered(self, count: int, *, prompt: bool = False) -> str:
        """The first messages, and with `prompt` what an answer follows."""
        messages = self.record.messages[:count]
        return self.renderer.render(messages, tools=self.record.tools, add_generation_prompt=prompt)

    def span(self, whole: str, number: int, counts: Counts) -> tuple[int, int] | None:
        """Where an assistant's turn begins and ends in a rendered conversation, if it is there."""
        after = self.rendered(number + 1)
        if not whole.startswith(after):
            return None
        begin = self._begin(number, after, counts)
        # No model ever has to say what the template puts behind the end mark (a line break).
        return None if begin is None else (begin, max(len(after.rstrip()), begin))

    def _begin(self, number: int, after: str, counts: Counts) -> int | None:
        """Where an assistant's turn begins in what is rendered up to its end."""
        if not number:
            return _opening(after, self.record.messages[0]["content"])
        before = self.rendered(number, prompt=True)
        if after.startswith(before):
            return len(before)
        # The prompt says more than the answer has: a thinking model's begins its thoughts.
        bare = self.rendered(number)
        pairs = zip(before, after, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        begin = max(before.rfind("\n", 0, common) + 1, len(bare))
        if not after.startswith(bare) or begin > common:
            return None
        counts.note(
            [
                f"the chat template asks for an answer with {before[begin:]!r}, "
                "which these answers don't begin with; they are trained as they are"
            ]
        )
        return begin


@lru_cache(maxsize=4)
def _marks(tokenizer: Any) -> frozenset[int]:
    """Ids of special tokens."""
    return frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)


def _whole(text: str, record: Record) -> str:
    """The text, if UTF-8 has all of its characters: JSON can hold half of one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise bad(record.where, f"its text holds half a character, {half}", "whole ones") from None
    return text


def _opening(whole: str, content: str) -> int:
    """Where an assistant's words begin that open a conversation.

    Templates have no prompt for such a turn.
    """
    return whole.find(content) if content in whole else len(whole)


def _with_spans(
    tokenizer: Any, text: str, spans: list[tuple[int, int]], *, special: bool
) -> Encoded:
    """Tokens of a text. Trained on are those that stand within the spans, whole."""
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    trained = [
        any(start <= first and last <= end for start, end in spans) and first < last
        for first, last in encoded["offset_mapping"]
    ]
    return Encoded(ids=list(encoded["input_ids"]), trained=trained)
