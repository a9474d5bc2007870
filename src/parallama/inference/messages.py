"""Conversations as they are given: each message has a role and a text. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ..errors import UsageError, lines, shown

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, as OpenAI's clients write it."""


def is_conversation(given: object) -> TypeGuard[Sequence[Message]]:
    """Whether this is one conversation, and not a list of them."""
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping)


def checked(messages: Any) -> list[dict[str, Any]]:
    """A conversation with contents as texts.

    Raises:
        UsageError: it is empty, or a message has no role or no text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise UsageError(
            lines(
                f"messages is {shown(messages)}",
                'expected a list of {"role": "user", "content": "..."}',
            )
        )
    if not messages:
        raise UsageError(lines("the conversation is empty", "expected at least one message"))
    return [_checked(number, message) for number, message in enumerate(messages)]


def _checked(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UsageError(
            lines(
                f"message {number} is {shown(message)}",
                'expected {"role": "system", "user" or "assistant", "content": "..."}',
            )
        )
    content = message.get("content")
    if isinstance(message.get("tool_calls"), list):
        message = {**message, "tool_calls": [_call(each) for each in message["tool_calls"]]}
    if content is None and message.get("tool_calls"):
        return dict(message)
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_text(number, part) for part in content)
    if not isinstance(content, str):
        raise UsageError(
            lines(f"the content of message {number} is {shown(content)}", "expected a text")
        )
    check_text(content, f"the content of message {number}")
    return {**message, "content": content}


def _call(given: Any) -> Any:
    """A tool call with its arguments as an object, as templates read them; OpenAI's are a text."""
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return given
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):  # what a model wrote need not be JSON
        return given
    return {**given, "function": {**function, "arguments": arguments}}


def _text(number: int, part: Any) -> str:
    """The text of a content's part."""
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise UsageError(
        lines(
            f"message {number} holds {shown(part)}",
            'expected parts {"type": "text", "text": "..."}: these models read text alone',
        )
    )


def check_text(text: str, what: str) -> None:
    """Refuse a text that no file could hold: half of a pair of UTF-16 surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise UsageError(
            lines(f"{what} holds {half!r}, half a character", "expected a text in Unicode")
        ) from None
