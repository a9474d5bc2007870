"""What the JSON files of a tokenizer may hold, key by key. Pure.

transformers takes most values as they are, and fails on them later, without the file's name. Keys
that are not listed here are left to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, lines, shown

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_MOST_TOKENS = 1 << 26
_SIDES = ("left", "right")


def check(name: str, document: Any) -> None:
    """Refuse a value of the wrong type in one of a tokenizer's files.

    Args:
        name: of the file, one of the three.
        document: the JSON in it.

    Raises:
        CheckpointError: with file and key.
    """
    if not isinstance(document, dict):
        raise CheckpointError(
            lines(
                f"{name} holds a {type(document).__name__}",
                "expected a JSON object, of a tokenizer",
            )
        )
    kinds = {SPECIAL: _TOKENS, CONFIG: _TOKENS | _SETTINGS}.get(name)
    if kinds is None:
        kinds = dict.fromkeys(document, (_is_id, "the number of a token"))
    for key, (is_right, expected) in kinds.items():
        if key in document and not is_right(document[key]):
            raise CheckpointError(
                lines(f"{name}: {shown(key)} is {shown(document[key])}", f"expected {expected}")
            )


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_TOKENS


def _is_token(value: Any) -> bool:
    """A text, or an object as transformers writes it of an added token."""
    if isinstance(value, Mapping):
        switches = ("lstrip", "rstrip", "single_word", "normalized", "special")
        return isinstance(value.get("content"), str) and all(
            isinstance(value.get(switch, False), bool) for switch in switches
        )
    return isinstance(value, str)


def _is_tokens(value: Any) -> bool:
    tokens = value.values() if isinstance(value, Mapping) else value
    is_list = isinstance(value, (list, Mapping))
    return value is None or (is_list and all(map(_is_token, tokens)))


def _is_decoder(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        key.isdecimal() and _is_id(int(key[:9])) and isinstance(token, Mapping) and _is_token(token)
        for key, token in value.items()
    )


def _is_length(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (is_number and value >= 1 and not math.isnan(value))


def _is_template(value: Any) -> bool:
    """One template; or several, each with a name."""
    if isinstance(value, list):
        return all(
            isinstance(entry, Mapping)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
            for entry in value
        )
    return value is None or isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_Kind = tuple[Callable[[Any], bool], str]
_ONE: _Kind = (
    lambda value: value is None or _is_token(value),
    "null, a text, or an object with its content",
)
_MANY: _Kind = (_is_tokens, "a list of texts, or of objects with their content")
_SWITCH: _Kind = (lambda value: value is None or isinstance(value, bool), "true or false")
_LENGTH: _Kind = (_is_length, "a number of tokens from 1 up")
_SIDE: _Kind = (lambda value: value in _SIDES, f"one of {', '.join(_SIDES)}")
_TOKENS: dict[str, _Kind] = {
    **dict.fromkeys((f"{which}_token" for which in ("bos", "eos", "unk", "pad")), _ONE),
    **dict.fromkeys((f"{which}_token" for which in ("sep", "cls", "mask")), _ONE),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _MANY),
}
_SETTINGS: dict[str, _Kind] = {
    **dict.fromkeys(("model_max_length", "max_length"), _LENGTH),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), _SWITCH),
    **dict.fromkeys(("clean_up_tokenization_spaces", "legacy"), _SWITCH),
    "split_special_tokens": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("padding_side", "truncation_side"), _SIDE),
    "tokenizer_class": (
        lambda value: value is None or isinstance(value, str),
        "the name of a class of transformers",
    ),
    "added_tokens_decoder": (_is_decoder, "an object of token numbers, each with its content"),
    "chat_template": (_is_template, "a text, or a list of objects with name and template"),
    "model_input_names": (_is_names, "a list of names"),
}
