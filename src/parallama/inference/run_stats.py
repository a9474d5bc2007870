"""What a session measures, and what it gives for each row. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class RunStats:
    """What a session measured: seconds of wall clock, and counts.

    Attributes:
        compile_s: of making programs, tracing included.
        trace_s: the tracing.
        ttft_s: of the last prefill, until its tokens were on the host.
        decode_host_s: part of `decode_s` outside of the executable and of waiting for its results.
        programs_compiled: by the engine's own count, while the session warmed up.
        programs_after_warmup: the same, in the session's own steps since then.
    """

    compile_s: float = 0.0
    trace_s: float = 0.0
    ttft_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_s: float = 0.0
    decode_host_s: float = 0.0
    programs_compiled: int = 0
    programs_after_warmup: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token with its log-probability under the model's own distribution.

    Attributes:
        token: its id.
        logprob: in nats.
        top: the most likely tokens in its place with theirs, best first, as many as asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One row's token in one step, with its log-probability under the model's own distribution.

    Attributes:
        top: the most likely tokens in its place with theirs, best first, as many as asked for.
        prompt: with the first token, if it was asked for: the prompt's tokens, scored; None for
            the first of them.
    """

    row: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    prompt: tuple[TokenLogprob | None, ...] | None = None

    @property
    def scored(self) -> TokenLogprob:
        """The token with what was told of it."""
        return TokenLogprob(token=self.token, logprob=self.logprob, top=self.top)
