"""A record into token ids with their loss mask, and into documents that a sequence has room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UsageError, lines
from ..files.chat_template import Renderer
from .records import Chat, Completion, DataError, Record, Text

TooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One document: token ids, and which of them are trained on."""

    ids: list[int]
    trained: list[bool]


@dataclass
class Counts:
    """What was done with records that are too long."""

    dropped: int = 0
    truncated: int = 0


def encode(record: Record, tokenizer: Any, renderer: Renderer | None = None) -> Encoded:
    """A record's token ids and loss mask, of any length.

    Args:
        renderer: of the tokenizer's chat template, for conversations.

    Raises:
        DataError: nothing of it is trained on, or the chat template doesn't say where an answer
            begins and ends.
        UsageError: it is a conversation, and there is no chat template.
        CheckpointError: the chat template is broken, or takes too long.
    """
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if isinstance(record, Text):
        ids = [*tokenizer(record.text, verbose=False)["input_ids"], *eos]
        encoded = Encoded(ids=ids, trained=[True] * len(ids))
        expected = "a text of two tokens or more: each is predicted from those before it"
    elif isinstance(record, Completion):
        text = record.prompt + record.completion
        found = _with_spans(tokenizer, text, [(len(record.prompt), len(text))], special=True)
        encoded = Encoded(ids=found.ids + eos, trained=found.trained + [True] * len(eos))
        expected = "an answer with text in it"
    else:
        encoded = _chat(record, tokenizer, renderer)
        expected = "an answer with text in it"
    if not any(encoded.trained[1:]):
        raise DataError(
            lines(
                f"data {record.where}: none of its {len(encoded.ids)} tokens is trained on",
                f"expected {expected}",
            )
        )
    return encoded


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


def _chat(record: Chat, tokenizer: Any, renderer: Renderer | None) -> Encoded:
    """By the chat template.

    Trained on are the assistant's words and the mark that ends its turn.
    """
    if renderer is None:
        raise UsageError(
            lines(
                f"data {record.where} is a conversation, but the model has no chat template",
                "expected prompt and completion, or text",
            )
        )
    try:
        whole = _rendered(renderer, record.messages)
        spans = [
            _span(record, renderer, whole, number)
            for number, message in enumerate(record.messages)
            if message["role"] == "assistant"
        ]
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


def _span(record: Chat, renderer: Renderer, whole: str, number: int) -> tuple[int, int]:
    """Where an assistant's turn begins and ends in the rendered conversation."""
    messages = record.messages
    if number:
        before = renderer.render(messages[:number])
    else:
        before = _rendered_opening(renderer, messages[0])
    after = _rendered(renderer, messages[: number + 1])
    if not (whole.startswith(after) and after.startswith(before)):
        raise DataError(
            lines(
                f"data {record.where}: the chat template writes message {number + 1} differently "
                "when others follow it",
                "expected a template that only appends",
                "give the conversation as {'prompt': ..., 'completion': ...}",
            )
        )
    # No model ever has to say what the template puts behind the end mark (a line break).
    return len(before), max(len(after.rstrip()), len(before))


def _rendered(renderer: Renderer, messages: Sequence[dict[str, str]]) -> str:
    return renderer.render(messages, add_generation_prompt=False)


def _rendered_opening(renderer: Renderer, message: dict[str, str]) -> str:
    """What stands before an assistant's words that open a conversation.

    Templates have no prompt for such a turn.
    """
    whole = _rendered(renderer, [message])
    return whole[: whole.find(message["content"])] if message["content"] in whole else whole


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
