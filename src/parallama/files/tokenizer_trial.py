"""Texts that are tokenized in a process of its own first, to see that they are in time and memory.

It is for tokenizers whose patterns are not known to be harmless (see `tokenizer_pipeline`). What
ends there in time ends here, too: the same text takes the same steps. This module imports
tokenizers alone, so the process starts within a fraction of a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import CheckpointError, lines
from .bounded_process import BoundedProcess, Ended, own_output, serve

LIMIT_S = 10.0
"""How long a call may take, and one second more for every `BYTES_PER_S`."""
BYTES_PER_S = 100_000
_MEMORY_BYTES = 1 << 30


class Trial:
    """Tries what a tokenizer is about to do.

    Args:
        backend: of the package tokenizers.
        origin: the model's name, for messages.
    """

    def __init__(self, backend: Any, origin: str) -> None:
        self._backend = backend
        self._origin = origin
        self._bounded = BoundedProcess(
            __name__, "tries tokenizers", ("done", "broken"), self._serialized
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts a process of its own."""
        return type(self), (self._backend, self._origin)

    def encode(self, texts: Iterable[str]) -> None:
        """Raise `CheckpointError` unless these texts are tokenized in time."""
        self._ask({"texts": list(texts)})

    def decode(self, ids: Sequence[int]) -> None:
        """Raise `CheckpointError` unless these token ids become text in time."""
        self._ask({"ids": list(ids)})

    def close(self) -> None:
        """End the process, if there is one; the next call starts another."""
        self._bounded.close()

    def _serialized(self) -> bytes:
        return json.dumps(self._backend.to_str()).encode() + b"\n"

    def _ask(self, question: dict[str, Any]) -> None:
        line = json.dumps(question).encode() + b"\n"
        limit = limit_s(line)
        try:
            reply = self._bounded.ask(line, limit_s=limit, limit_bytes=1 << 12)
        except Ended as error:
            raise CheckpointError(
                lines(
                    f"the tokenizer of {self._origin} {error}",
                    f"expected an answer within {limit:g} s, in at most "
                    f"{_MEMORY_BYTES >> 20} MB more memory",
                )
            ) from None
        if "broken" in reply:
            raise CheckpointError(
                lines(f"the tokenizer of {self._origin} cannot be used: {reply['broken']}")
            )


def limit_s(line: bytes) -> float:
    """How long the answer to a question may take."""
    return LIMIT_S + len(line) // BYTES_PER_S


def main() -> None:
    """Try what comes in, line by line, until the input ends. The first line is the tokenizer."""
    out = own_output()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.loads(sys.stdin.buffer.readline()))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    serve(lambda line: answer(tokenizer, line), out, limit_s=limit_s, memory_bytes=_MEMORY_BYTES)


def answer(tokenizer: Any, line: bytes) -> dict[str, str]:
    """The reply to a question: it is `done`, or why the tokenizer is `broken`."""
    question = json.loads(line)
    try:
        for text in question.get("texts", ()):
            tokenizer.encode(text)
        if "ids" in question:
            tokenizer.decode(question["ids"])
    except BaseException as error:  # Rust's panics are no `Exception`
        said = " ".join(str(error).split())[:200]
        return {"broken": f"{type(error).__name__}: {said}"}
    return {"done": ""}


if __name__ == "__main__":
    main()
