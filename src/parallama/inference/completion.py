"""What comes of a prompt: whole, or token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .requests import Request
from .run_stats import Choice, TokenLogprob
from .text_stream import TextStream
from .token_rules import Ends

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a prompt led to.

    Attributes:
        prompt: the prompt's text, or None if it was given as token ids.
        prompt_ids: its tokens.
        text: the new text, without special tokens and without a stop string.
        token_ids: the new tokens, the end-of-text one included.
        logprobs: log-probability of each under the model's own distribution.
        finish_reason: `stop` (end-of-text token or stop string) or `length`.
        index: its number among the completions of the prompt.
        stop_reason: the token id or the string that ended the text; None for the model's own end.
        top_logprobs: for each new token the likeliest in its place, best first, with their
            log-probabilities; empty unless asked for.
        prompt_logprobs: of the prompt's tokens, None for the first; None unless asked for.
    """

    prompt: str | None
    prompt_ids: list[int]
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    index: int = 0
    stop_reason: int | str | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One token of a stream.

    Attributes:
        text: text that is certain now; may be empty.
        token: the token's id.
        logprob: its log-probability.
        finish_reason: None until the last chunk.
        tokens_per_s: of decoding so far; 0 at the first token.
    """

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None
    tokens_per_s: float


@dataclass
class Row:
    """A row of a running batch, as the host sees it.

    Attributes:
        stream: makes text of its tokens.
        limit: most new tokens.
        ends: ids that end the text, with what is told of them.
    """

    stream: TextStream
    limit: int
    ends: Ends
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    of_prompt: tuple[TokenLogprob | None, ...] | None = None
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @classmethod
    def of(cls, request: Request, tokenizer: Any | None) -> Row:
        """The row of a request that has not begun."""
        params = request.params
        stream = TextStream(
            tokenizer,
            params.stop,
            least=params.min_tokens,
            behind=request.ids,
            keep_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )
        return cls(stream, request.limit, request.ends)

    def take(self, choice: Choice, tokens_per_s: float) -> Chunk:
        """Add a token, and end the row if it ends the text."""
        self.token_ids.append(choice.token)
        self.logprobs.append(choice.logprob)
        self.tops.append(choice.top)
        self.of_prompt = choice.prompt or self.of_prompt
        ended = choice.token in self.ends
        text = self.stream.push(choice.token, ends=ended)
        if ended or self.stream.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", self.ends.get(choice.token)
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self.stream.finish()
        if self.stream.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", self.stream.stopped
        self.text += text
        return Chunk(
            text=text,
            token=choice.token,
            logprob=choice.logprob,
            finish_reason=self.finish_reason,
            tokens_per_s=tokens_per_s,
        )

    def completion(self, request: Request) -> Completion:
        """What the row has come to."""
        return Completion(
            prompt=request.prompt,
            prompt_ids=request.ids,
            text=self.text,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason or "length",
            index=request.index,
            stop_reason=self.stop_reason,
            top_logprobs=self.tops if request.params.logprobs else [],
            prompt_logprobs=self.of_prompt,
        )
