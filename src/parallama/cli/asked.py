"""Prompts and conversations as `generate` is given them: options, files, standard input. Pure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import text_files
from ..errors import UsageError, lines, shown
from ..inference.messages import checked, is_conversation
from ..inference.sampling_params import SamplingParams, by_our_names
from .input import text_of

_CARRIED = ("id", "custom_id")
"""Keys of a line that come back with its results."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt or one conversation.

    Attributes:
        prompt: text or token ids, or None.
        messages: a conversation, or None.
        params: how it is continued, by the names of `SamplingParams`; over the command's options.
        carried: what comes back with its results.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[str, Any] = field(default_factory=dict)


def from_options(
    texts: list[str] | None, ids: list[str] | None, file: Path | None, messages: Path | None
) -> list[Asked]:
    """The prompts of `--prompt`, `--prompt-ids`, `--prompt-file`, and `--messages`.

    Without any of these it is what standard input holds. One final newline of a file or of standard
    input is not part of the prompt: editors and `echo` write it.

    Raises:
        UsageError: there is no prompt, or one is empty or cannot be read.
    """
    asked = [Asked(prompt=text) for text in texts or []]
    asked += [Asked(prompt=_ids(given)) for given in ids or []]
    if file is not None:
        asked.append(Asked(prompt=_without_newline(_read(file, "--prompt-file"))))
    if messages is not None:
        asked += _conversations(messages)
    if not asked:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError(
                lines(
                    "there is no prompt",
                    "expected --prompt, --prompt-ids, --prompt-file, --prompts-file, --messages,"
                    " or text on standard input",
                )
            )
        asked.append(Asked(prompt=_without_newline(text_of(sys.stdin.read))))
    if any(each.prompt is not None and len(each.prompt) == 0 for each in asked):
        raise UsageError(lines("a prompt is empty", "expected some text, or token ids"))
    return asked


def from_prompts_file(path: Path) -> list[Asked]:
    """The prompts of `--prompts-file`: a prompt a line, or in `.jsonl` an object a line.

    An object has `prompt` (text or token ids) or `messages`, and may have parameters of
    `SamplingParams` by name, `id` and `custom_id`. Empty lines are left out.

    Raises:
        UsageError: it cannot be read, or holds no prompt; or a line is wrong, with its number.
    """
    jsonl = path.suffix == ".jsonl"
    asked: list[Asked] = []
    for number, line in enumerate(_read(path, "--prompts-file").splitlines(), 1):
        if line.strip():
            carried = {"line": number}
            place = f"{path.name}, line {number}"
            asked.append(
                _row(line, place, carried) if jsonl else Asked(prompt=line, carried=carried)
            )
    if not asked:
        raise UsageError(lines(f"--prompts-file {str(path)!r} is empty", "expected prompts"))
    return asked


def _row(line: str, place: str, carried: dict[str, Any]) -> Asked:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            lines(f"{place} is no JSON: {error}", "expected an object a line")
        ) from None
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UsageError(lines(f"{place} is {shown(row)}", "expected prompt or messages"))
    carried |= {key: row.pop(key) for key in _CARRIED if key in row}
    try:
        prompt = _prompt(row.pop("prompt")) if "prompt" in row else None
        messages = checked(row.pop("messages")) if "messages" in row else None
        params = by_our_names(row)
        SamplingParams(**params)
    except UsageError as error:
        problem, *rest = str(error).splitlines()
        raise UsageError(lines(f"{place}: {problem}", *rest)) from None
    return Asked(prompt=prompt, messages=messages, params=params, carried=carried)


def _prompt(given: Any) -> str | list[int]:
    ids = isinstance(given, list) and all(type(token) is int for token in given)
    if not given or not (ids or isinstance(given, str)):
        raise UsageError(lines(f"the prompt is {shown(given)}", "expected a text or token ids"))
    prompt: str | list[int] = given
    return prompt


def _conversations(path: Path) -> Iterator[Asked]:
    """The conversations of a JSON file: one, or a list of them, or `{"messages": ...}`."""
    try:
        document = json.loads(_read(path, "--messages"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            lines(
                f"--messages {str(path)!r} is no JSON: {error}",
                'expected a list of {"role": "user", "content": "..."}',
            )
        ) from None
    given = document.get("messages") if isinstance(document, dict) else document
    one = is_conversation(given) and "messages" not in given[0]
    for each in [given] if one or not given or not isinstance(given, list) else given:
        yield Asked(messages=checked(each["messages"] if isinstance(each, dict) else each))


def _ids(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise UsageError(
            lines(
                f"--prompt-ids {given!r} cannot be read",
                "expected whole numbers with commas, as 1,2,3",
            )
        ) from None


def _read(path: Path, option: str) -> str:
    try:
        return text_files.read(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(
            lines(f"{option} {str(path)!r} cannot be read: {reason}", "expected a text file")
        ) from None


def _without_newline(text: str) -> str:
    return text.removesuffix("\n")
