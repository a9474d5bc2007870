"""What can be trained on: conversations, prompts with completions, texts. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, lines


class DataError(UsageError):
    """Training data that cannot be used."""


def bad(where: str, what: str, expected: str) -> DataError:
    """An error that names the file and the row."""
    return DataError(lines(f"data {where}: {what}", f"expected {expected}"))


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One row of data.

    Attributes:
        where: file and line.
        notes: what is to be said, once, of rows like this one.
    """

    where: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion(_Record):
    """A prompt and what should follow, which alone is trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Text(_Record):
    """A document; every token is trained on."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Chat(_Record):
    """A conversation.

    Attributes:
        messages: each with `role` and `content`, and what else a chat template may read of it.
        answers: numbers of the messages that are trained on; all are the assistant's.
        tools: functions that the assistant may call, for the chat template.
        plain: the same for a model without a chat template, where there is a known way.
    """

    messages: list[dict[str, Any]]
    answers: tuple[int, ...]
    tools: list[Any] | None = None
    plain: Completion | None = None


Record = Chat | Completion | Text
