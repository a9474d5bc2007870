"""What a server asks of the engine that answers its requests, and what it gets back. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from .run_stats import TokenLogprob as TokenLogprob

if TYPE_CHECKING:
    from .llm import LLM
    from .requests import Request

EndReason = Literal["stop", "length", "abort", "error"]
State = Literal["starting", "ready", "stopping", "dead"]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What of one request is new.

    Attributes:
        text: text that is certain now; may be empty.
        token_ids: new tokens.
        logprobs: of `token_ids`; empty unless asked for.
        finish_reason: None until the last update. `abort` follows `Ticket.cancel`, and `error` a
            failure of the engine.
        stop_reason: the token id or the string that ended the text; None for the model's own
            end-of-text token.
        cached_tokens: tokens of the prompt that were not computed.
        prompt_logprobs: of the prompt's tokens, None for the first; with the first update only,
            and only if asked for.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: EndReason | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


class Ticket(Protocol):
    """A request that is waiting or running."""

    def cancel(self) -> None:
        """End it; its slot is free after the step that runs now. From any thread, and twice."""


class Observer(Protocol):
    """Told what happens, for metrics. Called in the devices' thread: it must be quick."""

    def admitted(self, waited_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        """A request has got a slot."""

    def first_token(self, since_arrival_s: float) -> None:
        """A request has got its first token."""

    def token(self, since_last_s: float) -> None:
        """A request has got another token."""

    def ended(
        self, reason: EndReason, since_arrival_s: float, prompt_tokens: int, tokens: int
    ) -> None:
        """A request is over."""

    def compiled(self, programs: int) -> None:
        """Programs were compiled while serving, which should not happen."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy an engine is.

    Attributes:
        running, waiting: requests.
        kv_usage: part of the cache's positions that running requests hold, 0 to 1.
        programs: compiled so far.
    """

    running: int
    waiting: int
    kv_usage: float
    programs: int


class Serving(Protocol):
    """An engine that answers many requests at a time.

    Attributes:
        llm: the model; its tokenizer and templates are used from other threads.
    """

    llm: LLM

    def submit(
        self, request: Request, deliver: Callable[[Update], None], priority: int = 0
    ) -> Ticket:
        """Queue a request. `deliver` is called in a thread of texts, never in the devices'.

        Requests of a smaller `priority` go first.

        Raises:
            QueueFullError: too many requests or tokens wait.
            EngineStoppedError: it is stopping or dead.
            UsageError: the request doesn't fit.
        """

    def state(self) -> State:
        """Whether requests are taken."""

    def load(self) -> Load:
        """How busy it is."""

    def observe(self, observer: Observer) -> None:
        """Tell this observer from now on."""

    def close(self, timeout: float) -> None:
        """Take no more requests; end those that still run after `timeout` seconds."""
