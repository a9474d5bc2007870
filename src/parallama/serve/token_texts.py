"""What single tokens say, as texts and as bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's
_BROKEN = "\ufffd"


class TokenTexts:
    """Texts of single tokens, which together are the whole text.

    Args:
        tokenizer: of transformers; None gives ids as texts.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self.raw = lru_cache(1 << 16)(self._raw)

    def text(self, token: int, *, as_id: bool = False) -> str:
        """A token's text; half a character is written as `bytes:\\xe2`, as OpenAI does.

        Args:
            as_id: write `token_id:5` in its place.
        """
        if as_id or self._tokenizer is None:
            return f"token_id:{token}"
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, tokens: Sequence[int], start: int) -> list[int]:
        """Where each token begins, in letters of a text."""
        found, raw, before = [], b"", 0
        for token in tokens:
            found.append(start + before)
            raw += self.raw(token)
            before = len(raw.decode(errors="ignore"))
        return found

    def letters(self, tokens: Sequence[int]) -> int:
        """How many letters tokens have together."""
        return len(b"".join(map(self.raw, tokens)).decode(errors="ignore"))

    def _raw(self, token: int) -> bytes:
        """The bytes of a token."""
        if self._tokenizer is None:
            return b""
        text = str(self._tokenizer.decode([token], skip_special_tokens=False))
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return text.encode()
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        if piece.startswith(_SPACE) and not text.startswith(" "):
            text = f" {text}"
        if _BROKEN not in text:
            return text.encode()
        letters = [_byte_level().get(letter) for letter in piece]
        return bytes(each for each in letters if each is not None) or text.encode()


@lru_cache(1)
def _byte_level() -> dict[str, int]:
    """The letters that byte-level BPE writes for bytes, as GPT-2 has them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
