"""Reading training data: JSONL of chats, of prompts with completions, or of text; text files. Pure.

Every record says where it came from. A wrong one is an error with file and line, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import text_files
from ..errors import ParallamaError, UsageError, cause, lines, listed, shown

SHIPPED = {"shipped:chat": "chat.jsonl", "shipped:text": "constitution.txt"}
SUFFIXES = (".jsonl", ".txt")
ROLES = ("system", "user", "assistant", "tool")
_FORMS = "{'messages': [...]}, {'prompt': ..., 'completion': ...} or {'text': ...}"


class DataError(UsageError):
    """Training data that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation; every assistant's turn is trained on.

    Attributes:
        messages: each with `role` and `content`.
        where: file and line.
    """

    messages: list[dict[str, str]]
    where: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and what should follow, which alone is trained on."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Text:
    """A document; every token is trained on."""

    text: str
    where: str


Record = Chat | Completion | Text


def find_files(source: str) -> list[Path]:
    """The files of a data source, in order.

    Args:
        source: a `.jsonl` or `.txt` file, a folder of them (with folders within), or a name of
            `SHIPPED`.

    Raises:
        DataError: it is not there, or holds no such file.
    """
    if source in SHIPPED:
        return [Path(str(files("parallama").joinpath("data", SHIPPED[source])))]
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            found = sorted(
                file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()
            )
            if not found:
                endings = " or ".join(SUFFIXES)
                raise DataError(
                    lines(
                        f"data folder {shown(source)} has no files ending in {endings}",
                        "expected at least one",
                    )
                )
            return found
        if not path.is_file():
            known = ", ".join(SHIPPED)
            raise DataError(
                lines(
                    f"data {shown(source)} is not there",
                    f"expected a .jsonl or .txt file, a folder of them, {known}, or hf:NAME",
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
    if path.suffix not in SUFFIXES:
        raise DataError(
            lines(
                f"data file {shown(source)} is of no known kind",
                f"expected a name ending in {' or '.join(SUFFIXES)}",
            )
        )
    return [path]


def read_records(path: Path) -> Iterator[tuple[Record, int]]:
    """The records of one file, each with how many of its bytes were read by then.

    Empty lines of JSONL are passed over.

    Raises:
        DataError: the file can't be read or is empty, or a line is no record.
    """
    try:
        if path.suffix == ".txt":
            content = path.read_bytes()
            if not content.strip():
                raise _bad(str(path), "it is empty", "some text")
            yield Text(text=text_files.decode(content), where=str(path)), len(content)
            return
        empty, done = True, 0
        # As bytes: only \n ends a line of JSONL, not the other characters that Python splits at.
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                done += len(line)
                if line.strip():
                    empty = False
                    yield parse_line(line, f"{path}:{number}"), done
        if empty:
            raise _bad(str(path), "it is empty", f"a line for each record, as {_FORMS}")
    except OSError as error:
        raise DataError(
            lines(
                f"data file {str(path)!r} cannot be read: {error.strerror}",
                "expected a readable file",
            )
        ) from None
    except UnicodeDecodeError:
        raise _bad(str(path), "it is not UTF-8", "UTF-8 text") from None


def parse_line(line: bytes, where: str) -> Record:
    """One line of JSONL."""
    try:
        document = json.loads(text_files.decode(line))
    except UnicodeDecodeError:
        raise _bad(where, "it is not UTF-8", "UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise _bad(
            where, f"it is not JSON: {cause(error)}", f"one JSON object a line, as {_FORMS}"
        ) from None
    return parse(document, where)


def parse(document: Any, where: str) -> Record:
    """A record from a decoded object. Keys beside those of its form are metadata, and not read.

    Raises:
        DataError: it is of none of the forms, or of several.
    """
    if not isinstance(document, Mapping):
        raise _bad(where, f"it is {shown(document, 40)}", f"a JSON object, as {_FORMS}")
    has_messages, has_text = "messages" in document, "text" in document
    has_prompt = "prompt" in document or "completion" in document
    forms = has_messages + has_prompt + has_text
    if forms != 1:
        keys = listed([str(key) for key in document]) or "none"
        what = f"{'several' if forms else 'none'} of messages, prompt and text (keys: {keys})"
        raise _bad(where, f"it has {what}", f"one of {_FORMS}")
    if has_messages:
        return Chat(messages=_messages(document["messages"], where), where=where)
    if has_text:
        return Text(text=_text(document, "text", where), where=where)
    prompt = document.get("prompt")
    if not isinstance(prompt, str):  # an empty one is fine
        raise _bad(where, f"'prompt' is {shown(prompt, 40)}", "text")
    return Completion(prompt=prompt, completion=_text(document, "completion", where), where=where)


def _messages(given: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(given, list) or not given:
        raise _bad(
            where, f"'messages' is {shown(given, 40)}", "a list of {'role': ..., 'content': ...}"
        )
    messages = []
    for number, message in enumerate(given, 1):
        roles = f"a role of {', '.join(ROLES)}"
        if not isinstance(message, Mapping):
            raise _bad(where, f"message {number} is {shown(message, 40)}", roles)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _bad(where, f"message {number} has role {shown(role, 40)}", roles)
        if not isinstance(content, str):
            raise _bad(where, f"message {number} has content {shown(content, 40)}", "text")
        messages.append({"role": str(role), "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise _bad(
            where,
            "no message has role assistant",
            "at least one assistant's turn, which is what is trained on",
        )
    return messages


def _text(document: Mapping[str, Any], key: str, where: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not value:
        raise _bad(where, f"{key!r} is {shown(value, 40)}", "text that isn't empty")
    return value


def _bad(where: str, what: str, expected: str) -> DataError:
    return DataError(lines(f"data {where}: {what}", f"expected {expected}"))
