"""Token ids to text as it comes: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
_BEHIND = 6
"""Tokens of the prompt that a text begins behind: they decide about its first space."""


class TextStream:
    """Turns one row's tokens into text.

    Args:
        tokenizer: of transformers; None gives empty text.
        stop: strings that end the text; they and what follows are not part of it.
        least: tokens in which no stop string is looked for.
        behind: the prompt's tokens.
        keep_stop: what ends the text is part of it.
        skip_special_tokens: special tokens are no part of the text.

    Attributes:
        stopped: the stop string that has ended the text.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        stop: Sequence[str] = (),
        *,
        least: int = 0,
        behind: Sequence[int] = (),
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._keep_stop, self._skip_special = keep_stop, skip_special_tokens
        self._least = least
        self._ids = list(behind[-_BEHIND:])
        self._from = 0  # ids before are in the text for good
        self._seen = len(self._ids)  # ids whose characters were handed out or are held back
        self._held = ""
        self.stopped: str | None = None
        if tokenizer is not None and self._decode(self._ids).endswith(_UNFINISHED):
            self._ids, self._seen = [], 0  # half a character is the prompt's own

    def push(self, token: int, *, ends: bool = False) -> str:
        """Add a token; returns the text that is certain now.

        Args:
            ends: it ends the text, of which it is a part only with `keep_stop`.
        """
        if self._tokenizer is None or self.stopped is not None or (ends and not self._keep_stop):
            return ""
        self._least -= 1
        self._ids.append(token)
        # Decode from a little before: what comes there decides about spaces. vLLM does the same.
        before = self._decode(self._ids[self._from : self._seen])
        after = self._decode(self._ids[self._from :])
        if after.endswith(_UNFINISHED):
            return ""
        self._from, self._seen = self._seen, len(self._ids)
        return self._release(after[len(before) :], final=False)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self._tokenizer is None or self.stopped is not None:
            return ""
        before = self._decode(self._ids[self._from : self._seen])
        after = self._decode(self._ids[self._from :])
        return self._release(after[len(before) :], final=True)

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special))

    def _release(self, new: str, *, final: bool) -> str:
        text = self._held + new
        if self._least >= 0:
            return text
        ends = [(at, string) for string in self._stop if (at := text.find(string)) >= 0]
        if ends:
            at, self.stopped = min(ends)
            self._held = ""
            return text[: at + len(self.stopped) if self._keep_stop else at]
        keep = 0 if final else max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
