"""Which tokenizers take a time and memory in proportion to the text, whatever the text is. Pure.

A tokenizer.json brings regular expressions, replacements and their order. Some take exponential
time or memory. What is not known to be harmless here is tried in a process of its own first: see
`tokenizer_trial`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*"
_GPT_4O = rf"{_WORD}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_WORD}{_UPPER}+{_LOWER}*{_ENDINGS}?"
_KNOWN_REGEXES = {
    # Llama 3, GPT-4
    rf"{_ENDINGS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    # Qwen 2 and 3
    rf"{_ENDINGS}|{_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    # Mistral's Tekken
    rf"{_TEKKEN}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    # GPT-4o, Llama 4
    rf"{_GPT_4O}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    # GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Runs of spaces become one, as SentencePiece's models have it
    r" {2,}",
}
_KNOWN_TEXTS = {(" ", "\u2581"), ("\u2581", " ")}
"""Replacements of a text by another; only these may make a text longer."""
_PLAIN = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer"),
    *("ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"),
    *("Digits", "Punctuation", "CharDelimiterSplit", "UnicodeScripts"),
    *("BertProcessing", "RobertaProcessing"),
    *("ByteFallback", "Fuse", "WordPiece", "BPEDecoder"),
}
"""Types of parts that have no pattern of their own."""
_MODELS = {"BPE", "WordLevel"}
_MOST_PARTS = 8
"""Each of so many parts at most doubles a text, or nearly so."""
_MOST_PIECES = 64
_LONGEST_TEXT = 64
_KEYS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_KEY = re.compile(rb'"(?:' + "|".join(_KEYS).encode() + rb')"\s*:\s*')
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7][0-9a-fA-F]")
_LONGEST_COMPONENT = 1 << 16


def is_bounded_model(kind: str) -> bool:
    """Whether a model (by tokenizers' name of its class) tokenizes words in bounded time."""
    return kind in _MODELS


def is_bounded(component: Any) -> bool:
    """Whether a component of a tokenizer.json takes bounded time and memory on every text.

    Args:
        component: a normalizer, pre-tokenizer, post-processor or decoder, or None.
    """
    parts = list(_parts(component))
    return len(parts) <= _MOST_PARTS and all(map(_is_bounded_part, parts))


def is_bounded_file(content: bytes) -> bool:
    """Whether a tokenizer.json can be loaded in bounded time.

    It is scanned for components, not parsed: its vocabulary may be large. What cannot be told from
    the scan is not bounded.
    """
    if _ESCAPED_LETTER.search(content):
        return False  # a key could be hidden
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    for key in _KEY.finditer(content):
        start = content[key.end() : key.end() + _LONGEST_COMPONENT].decode(errors="replace")
        try:
            component, _ = decoder.raw_decode(start)
        except (ValueError, RecursionError):
            return False
        if isinstance(component, int):
            continue  # a token of this name, in the vocabulary
        if not is_bounded(component):
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """The parts of nested sequences, in order."""
    waiting = [component]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        if isinstance(part, dict) and part.get("type") == "Sequence":
            for value in part.values():
                waiting += reversed(value) if isinstance(value, list) else ()
        else:
            yield part if isinstance(part, dict) else {}


def _is_bounded_part(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    if not isinstance(kind, str):
        return False
    if kind in _PLAIN:
        return True
    if kind == "Strip":  # a normalizer has no counts; a decoder walks as far as they say
        return all(part.get(key, 0) in (0, 1) for key in ("start", "stop"))
    if kind == "Prepend":
        return len(str(part.get("prepend"))) <= _LONGEST_TEXT
    if kind == "Split":
        return _is_bounded_split(part.get("pattern"))
    if kind == "Replace":
        return _is_bounded_replace(part.get("pattern"), part.get("content"))
    if kind == "TemplateProcessing":
        pieces = part.get("single")
        return isinstance(pieces, list) and len(pieces) <= _MOST_PIECES
    return False


def _is_bounded_split(pattern: Any) -> bool:
    regex, text = _pattern(pattern)
    return regex in _KNOWN_REGEXES or 0 < len(text) <= _LONGEST_TEXT


def _is_bounded_replace(pattern: Any, content: Any) -> bool:
    regex, text = _pattern(pattern)
    if not isinstance(content, str):
        return False
    if regex in _KNOWN_REGEXES:
        return len(content) <= 1
    shorter = content.isascii() and len(content) <= len(text)
    return bool(text) and (shorter or (text, content) in _KNOWN_TEXTS)


def _pattern(pattern: Any) -> tuple[str, str]:
    """The regular expression and the text of a pattern, which has one of the two."""
    if not isinstance(pattern, dict) or len(pattern) != 1:
        return "", ""
    regex, text = pattern.get("Regex"), pattern.get("String")
    return regex if isinstance(regex, str) else "", text if isinstance(text, str) else ""
