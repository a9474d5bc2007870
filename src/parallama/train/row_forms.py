"""A row of data into a record, by the keys that it has. Pure.

The forms are those of the sets that people train on: OpenAI's and TRL's messages, ShareGPT's
conversations, Alpaca's instructions, prompts with completions, texts. A wrong row is an error with
file and line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import listed, shown
from .records import Chat, Completion, Record, Text, bad

FORMS = (
    "{'messages': [...]}, {'conversations': [...]}, {'instruction': ..., 'output': ...}, "
    "{'prompt': ..., 'completion': ...} or {'text': ...}"
)
ROLES = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "model", "chatgpt", "bing", "bard")},
    **{name: "tool" for name in ("tool", "function", "observation")},
}
"""Names of roles, in OpenAI's, ShareGPT's and Gemma's data, and what chat templates call them."""
_ROLES = "system, user, assistant, tool (or human, gpt, as in ShareGPT)"
_TURNS = ("messages", "conversations", "conversation")
_ASKED = ("instruction", "question", "query")
_BESIDE = ("input", "context")
_ANSWERED = ("output", "response", "answer")
_SYSTEM = ("system", "system_prompt")
_PAIRS = ("chosen", "rejected")
_KEYS = (*_TURNS, *_ASKED, *_BESIDE, *_ANSWERED, "prompt", "completion", "text", *_PAIRS)
"""Keys that hold text to train on. Others are metadata, and not read."""
_TRAINED = ("weight", "train", "loss")
"""Keys of a message that say whether an answer is trained on: OpenAI's, axolotl's, ms-swift's."""
_FOR_TEMPLATES = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What chat templates may read of a message besides its role and content."""
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{asked}\n\n{input}### Response:\n"
)
"""The prompt that Stanford's Alpaca was trained with."""
_PAIRED = ", paired with an input that provides further context"


def parse(document: Any, where: str) -> Record:
    """A record from a decoded object.

    Of several forms the first counts, in the order of `FORMS`, and a note says so. A key that is
    null counts as not there: data sets give every row all of their keys.

    Raises:
        DataError: it is of none of the forms.
    """
    if not isinstance(document, Mapping):
        raise bad(where, f"it is {shown(document, 40)}", f"a JSON object, as {FORMS}")
    row = {key: value for key, value in document.items() if value is not None}
    for has, read in _READERS:
        if has(row):
            return read(row, where)
    keys = listed([str(key) for key in document]) or "none"
    if any(key in row for key in _PAIRS):
        raise bad(
            where,
            f"it is a pair of answers to choose from (keys: {keys})",
            f"one answer, as {FORMS}",
        )
    forms = "messages, conversations, instruction, prompt and text"
    raise bad(where, f"it has none of {forms} (keys: {keys})", f"one of {FORMS}")


def _conversation(row: Mapping[str, Any], where: str) -> Chat:
    key = next(key for key in _TURNS if key in row)
    messages, answers = _messages(row[key], key, where)
    used = [key]
    if messages[0]["role"] != "system":
        system, named = _system(row, where)
        messages, answers = system + messages, [len(system) + number for number in answers]
        used += named
    return Chat(
        messages=messages,
        answers=_some(answers, where),
        tools=_tools(row, where),
        where=where,
        notes=_unread(row, used),
    )


def _instruction(row: Mapping[str, Any], where: str) -> Chat:
    """As a turn of the user and one of the assistant. LLaMA-Factory's sets have `history`, too."""
    asked_key = next(key for key in _ASKED if key in row)
    answered_key = next((key for key in _ANSWERED if key in row), _ANSWERED[0])
    beside_key = next((key for key in _BESIDE if key in row), _BESIDE[0])
    asked, beside = _words(row, asked_key, where), _words(row, beside_key, where)
    answer = _text(row, answered_key, where)
    question = "\n\n".join(part for part in (asked, beside) if part)
    if not question:
        raise bad(where, f"{asked_key!r} is empty", "text")
    system, named = _system(row, where)
    messages = [*system, *_history(row, where)]
    messages += [_message("user", question), _message("assistant", answer)]
    plain = None
    if len(messages) == 2:
        prompt = _ALPACA.format(
            paired=_PAIRED if beside else "",
            asked=asked,
            input=f"### Input:\n{beside}\n\n" if beside else "",
        )
        plain = Completion(prompt=prompt, completion=answer, where=where)
    used = [asked_key, beside_key, answered_key, *named]
    return Chat(
        messages=messages,
        answers=_assistants(messages),
        plain=plain,
        where=where,
        notes=_unread(row, used),
    )


def _pair(row: Mapping[str, Any], where: str) -> Record:
    """Two texts; or, as TRL has it, the messages before an answer, and the answer's."""
    prompt, notes = row.get("prompt"), _unread(row, ("prompt", "completion"))
    prompt = _rows_of(prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        before, _ = _messages(prompt, "prompt", where)
        after, answers = _messages(row.get("completion"), "completion", where)
        trained = [len(before) + number for number in answers]
        return Chat(
            messages=before + after,
            answers=_some(trained, where),
            tools=_tools(row, where),
            where=where,
            notes=notes,
        )
    if not isinstance(prompt, str):  # an empty one is fine
        raise bad(where, f"'prompt' is {shown(prompt, 40)}", "text, or a list of messages")
    completion = _text(row, "completion", where)
    return Completion(prompt=prompt, completion=completion, where=where, notes=notes)


def _plain_text(row: Mapping[str, Any], where: str) -> Text:
    return Text(text=_text(row, "text", where), where=where, notes=_unread(row, ("text",)))


_READERS: tuple[
    tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any], str], Record]], ...
] = (
    (lambda row: any(key in row for key in _TURNS), _conversation),
    (lambda row: any(key in row for key in _ASKED), _instruction),
    (lambda row: "completion" in row or ("prompt" in row and "text" not in row), _pair),
    (lambda row: "text" in row, _plain_text),
)
"""Whether a row is of a form, and what reads it."""


def _unread(row: Mapping[str, Any], used: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """What a row holds beside what is read of it."""
    others = [key for key in _KEYS if row.get(key) and key not in used]
    read = [key for key in used if key in row]
    if not others:
        return ()
    return (f"rows have {listed([*read, *others], 8)}: {listed(others)} not read",)


def _messages(given: Any, key: str, where: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Messages as chat templates know them, and the numbers of those to train on."""
    given = _rows_of(given)
    if not isinstance(given, list) or not given:
        raise bad(
            where, f"{key!r} is {shown(given, 40)}", "a list of {'role': ..., 'content': ...}"
        )
    messages, answers = [], []
    for number, message in enumerate(given):
        called = f"message {number + 1}"
        if not isinstance(message, Mapping):
            raise bad(where, f"{called} is {shown(message, 40)}", f"a role of {_ROLES}")
        role = message.get("role", message.get("from"))
        known = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            raise bad(where, f"{called} has role {shown(role, 40)}", f"a role of {_ROLES}")
        content = _content(message.get("content", message.get("value")))
        if content is None and message.get("tool_calls"):
            content = ""
        if content is None:
            value = message.get("content", message.get("value"))
            raise bad(where, f"{called} has content {shown(value, 40)}", "text")
        more = {name: message[name] for name in _FOR_TEMPLATES if message.get(name) is not None}
        messages.append(_message(known, content) | more)
        if known == "assistant" and _is_trained(message, called, where):
            answers.append(number)
    return messages, answers


def _rows_of(given: Any) -> Any:
    """A list of messages, where a data set has made an object of lists or JSON of it."""
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    if not isinstance(given, Mapping) or not all(isinstance(each, list) for each in given.values()):
        return given
    if len({len(each) for each in given.values()}) != 1:
        return given
    return [dict(zip(given, each, strict=True)) for each in zip(*given.values(), strict=True)]


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _assistants(messages: list[dict[str, Any]]) -> tuple[int, ...]:
    return tuple(at for at, message in enumerate(messages) if message["role"] == "assistant")


def _content(content: Any) -> str | None:
    """A message's text. Parts of text, as OpenAI has them, are put together."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if texts and len(texts) == len(parts) else None
    return content if isinstance(content, str) else None


def _is_trained(message: Mapping[str, Any], called: str, where: str) -> bool:
    given = {key: message[key] for key in _TRAINED if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise bad(where, f"{called} has {key} {shown(value, 40)}", "0 or 1")
    return all(given.values())


def _some(answers: list[int], where: str) -> tuple[int, ...]:
    if not answers:
        raise bad(
            where,
            "no message has role assistant, and is to be trained on",
            "at least one assistant's turn, which is what is trained on",
        )
    return tuple(answers)


def _system(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The system message that stands beside a conversation, and its key."""
    key = next((key for key in _SYSTEM if row.get(key)), None)
    if key is None:
        return [], []
    return [_message("system", _text(row, key, where))], [key]


def _history(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Earlier turns, as pairs."""
    messages: list[dict[str, Any]] = []
    for pair in row.get("history") or []:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        ):
            raise bad(where, f"'history' has {shown(pair, 40)}", "pairs of question and answer")
        messages += [_message("user", pair[0]), _message("assistant", pair[1])]
    return messages


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """Functions to call; many sets have them as JSON within the JSON."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise bad(where, f"'tools' is {shown(tools, 40)}", "a list of functions") from None
    if tools and not isinstance(tools, list):
        raise bad(where, f"'tools' is {shown(tools, 40)}", "a list of functions")
    return tools or None


def _words(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str):
        raise bad(where, f"{key!r} is {shown(value, 40)}", "text")
    return value


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise bad(where, f"{key!r} is {shown(value, 40)}", "text that isn't empty")
    return value
