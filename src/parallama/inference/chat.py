"""A conversation whose cache is kept between turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import UsageError, lines
from .completion import Chunk, Row
from .llm import LLM
from .text_stream import TextStream

DEFAULT_CHAT_LENGTH = 2048
DEFAULT_ANSWER_TOKENS = 512


class Chat:
    """A conversation with a model. A turn computes only what is new since the last.

    Args:
        llm: the model; it needs a chat template.
        system: system message.
        max_model_len: most tokens of the whole conversation; if None 2,048, or the model's maximum
            if that is less.
        **sampling: see `LLM.sampling_params`.

    Attributes:
        messages: what was said, as `{"role", "content"}`.
        stats: sums over all turns; `ttft_s` is of the last.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        system: str | None = None,
        max_model_len: int | None = None,
        **sampling: Any,
    ) -> None:
        self._llm = llm
        self._turn = 0
        self.messages: list[dict[str, str]] = (
            [{"role": "system", "content": system}] if system is not None else []
        )
        if max_model_len is not None and not 1 <= max_model_len <= llm.max_model_len:
            raise UsageError(
                lines(
                    f"max_model_len is {max_model_len}",
                    f"expected 1 to {llm.max_model_len}, the model's limit",
                )
            )
        self.max_model_len = max_model_len or min(DEFAULT_CHAT_LENGTH, llm.max_model_len)
        llm.render_chat([{"role": "user", "content": "?"}])
        self._session = llm.session(
            [llm.sampling_params(**sampling)],
            capacity=self.max_model_len,
            eos=llm.eos_ids,
            continued=True,
        )
        self.stats = self._session.stats

    def send(self, content: str, *, max_new_tokens: int | None = None) -> Iterator[Chunk]:
        """Say something; yields the answer as it comes and remembers both.

        An answer that is not read to its end is not remembered. The next message ends it.

        Args:
            max_new_tokens: most tokens of the answer; 512, or what the limit leaves, if None.

        Raises:
            UsageError: nothing was said, or the conversation is over its limit. It stays as it was.
        """
        if not content.strip():
            raise UsageError(lines("the message is empty", "expected some text"))
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
            raise UsageError(
                lines(
                    f"max_new_tokens is {max_new_tokens!r}", "expected a whole number of at least 1"
                )
            )
        asked = [*self.messages, {"role": "user", "content": content}]
        ids = self._llm.render_chat(asked)
        room = self.max_model_len - len(ids)
        if room < 1 or (max_new_tokens or 0) > room:
            raise UsageError(
                lines(
                    f"the conversation has {len(ids)} tokens, which leaves {max(room, 0)}"
                    f" of {self.max_model_len} for an answer",
                    "start a new one, or raise --max-model-len",
                )
            )
        limit = min(room, DEFAULT_ANSWER_TOKENS) if max_new_tokens is None else max_new_tokens
        self._turn += 1
        return self._answer(asked, ids, Row(TextStream(self._llm.tokenizer), limit), self._turn)

    def reset(self) -> None:
        """Start over, with the system message if there is one."""
        self._turn += 1
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _answer(
        self, asked: list[dict[str, str]], ids: list[int], row: Row, turn: int
    ) -> Iterator[Chunk]:
        self._check(turn)
        for _, chunk in self._llm.drive(self._session, [ids], [row], ignore_eos=False):
            yield chunk
            self._check(turn)
        self.messages = [*asked, {"role": "assistant", "content": row.text}]

    def _check(self, turn: int) -> None:
        """Raise `UsageError` where another turn has begun, or the conversation was started over."""
        if turn != self._turn:
            raise UsageError(
                lines(
                    "this answer is over: the conversation has gone on without it",
                    "read an answer to its end before the next message",
                )
            )
