"""Token ids to text as it comes: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"


class TextStream:
    """Turns one row's tokens into text.

    Args:
        tokenizer: of transformers; None gives empty text.
        stop: strings that end the text; they and what follows are not part of it.
    """

    def __init__(self, tokenizer: Any | None, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._ids: list[int] = []
        self._from = 0  # ids before are in the text for good
        self._seen = 0  # ids whose characters were handed out or are held back
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now."""
        if self._tokenizer is None or self.stopped:
            return ""
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
        if self._tokenizer is None or self.stopped:
            return ""
        before = self._decode(self._ids[self._from : self._seen])
        after = self._decode(self._ids[self._from :])
        return self._release(after[len(before) :], final=True)

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _release(self, new: str, *, final: bool) -> str:
        text = self._held + new
        ends = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if final else max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
