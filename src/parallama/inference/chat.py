"""A conversation whose cache is kept between turns."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import UsageError, lines
from .completion import Chunk
from .llm import LLM
from .messages import Message, checked
from .sampling_params import SamplingParams
from .seeds import row_seed

DEFAULT_CHAT_LENGTH = 2048
DEFAULT_ANSWER_TOKENS = 512


class Chat:
    """A conversation with a model. A turn computes only what is new since the last.

    Args:
        llm: the model; it needs a chat template.
        system: system message.
        messages: what was said before, as `{"role", "content"}`.
        max_model_len: most tokens of the whole conversation; if None 2,048, or the model's maximum
            if that is less.
        chat_template_kwargs: variables for the template, as `{"enable_thinking": False}`.
        **sampling: see `SamplingParams`. With a seed, a turn's answer is that of `LLM.chat` to
            the same messages.

    Attributes:
        messages: what was said, as `{"role", "content"}`.
        stats: sums over all turns; `ttft_s` is of the last.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        system: str | None = None,
        messages: Sequence[Message] = (),
        max_model_len: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> None:
        self._llm = llm
        self._template_kwargs = chat_template_kwargs
        self._turn = 0
        self._params = SamplingParams(**sampling)
        if self._params.n != 1:
            raise UsageError(lines(f"n is {self._params.n}", "a chat has one answer: expected 1"))
        self._drawn = secrets.randbits(64) if self._params.seed is None else self._params.seed
        self._asked: Counter[tuple[int, ...]] = Counter()
        self.messages: list[dict[str, Any]] = checked(messages) if messages else []
        if system is not None:
            if any(message["role"] == "system" for message in self.messages):
                raise UsageError(
                    lines("system was given, and messages have one", "expected one of them")
                )
            self.messages.insert(0, {"role": "system", "content": system})
        if max_model_len is not None and not 1 <= max_model_len <= llm.max_model_len:
            raise UsageError(
                lines(
                    f"max_model_len is {max_model_len}",
                    f"expected 1 to {llm.max_model_len}, the model's limit",
                )
            )
        self.max_model_len = max_model_len or min(DEFAULT_CHAT_LENGTH, llm.max_model_len)
        self._rendered([{"role": "user", "content": "?"}])
        self._runner = llm.alone(self.max_model_len)
        self.stats = self._runner.session.stats

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
        wanted = SamplingParams(max_new_tokens=max_new_tokens).max_new_tokens
        wanted = wanted or self._params.max_new_tokens
        asked = [*self.messages, {"role": "user", "content": content}]
        ids = self._rendered(asked)
        room = self.max_model_len - len(ids)
        if room < 1 or (wanted or 0) > room:
            raise UsageError(
                lines(
                    f"the conversation has {len(ids)} tokens, which leaves {max(room, 0)}"
                    f" of {self.max_model_len} for an answer",
                    "start a new one, or raise --max-model-len",
                )
            )
        limit = min(room, DEFAULT_ANSWER_TOKENS) if wanted is None else wanted
        self._turn += 1
        return self._answer(asked, ids, limit, self._turn)

    def _rendered(self, messages: Sequence[Message]) -> list[int]:
        return self._llm.render_chat(messages, chat_template_kwargs=self._template_kwargs)

    def reset(self) -> None:
        """Start over, with the system message if there is one."""
        self._turn += 1
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _answer(
        self, asked: list[dict[str, Any]], ids: list[int], limit: int, turn: int
    ) -> Iterator[Chunk]:
        self._check(turn)
        seed = row_seed(self._drawn, ids, self._asked[tuple(ids)])
        self._asked[tuple(ids)] += 1
        request = self._llm.request(ids, self._params, seed, limit, answers=True)
        row = self._llm.row(request)
        self._runner.end(0)
        self._runner.add(0, ids, request.choosing)
        for _, chunk, _ in self._llm.driven(self._runner, [row]):
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
