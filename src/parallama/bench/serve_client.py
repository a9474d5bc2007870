"""One request of a benchmark over HTTP: sent, streamed, timed. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx2

from ..errors import RunError, cause, lines
from ..remote_server import MODELS, RemoteServer, first_model, refusal, stream_error

CONNECT_S, SILENCE_S = 30.0, 600.0
"""How long a connection may take, and how long a server may say nothing."""


@dataclass(kw_only=True)
class Outcome:
    """What became of one request; times are of `time.perf_counter`.

    Attributes:
        prompt_tokens: as the server counts them, otherwise as the prompt was made.
        began: when it was sent.
        waited_s: for its turn, with a limit on requests at a time.
        arrived: when each chunk with text came.
        ended: when the last chunk came.
        counted: tokens of the answer, where the server says so.
        finished: its end was announced.
        error: why it failed, or None.
        gone: it failed since the connection did.
    """

    prompt_tokens: int
    began: float = 0.0
    waited_s: float = 0.0
    arrived: list[float] = field(default_factory=list)
    ended: float = 0.0
    counted: int | None = None
    text: str = ""
    finished: bool = False
    error: str | None = None
    gone: bool = False

    @property
    def output_tokens(self) -> int:
        """By the server's count, otherwise the chunks that brought text."""
        return len(self.arrived) if self.counted is None else self.counted

    @property
    def ttft_s(self) -> float:
        return (self.arrived[0] if self.arrived else self.ended) - self.began

    @property
    def latency_s(self) -> float:
        return self.ended - self.began

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token behind the first; None where there is none."""
        if self.output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Seconds from each chunk to the next."""
        return [after - before for before, after in pairwise(self.arrived)]


def client(server: RemoteServer) -> httpx2.AsyncClient:
    """A client with as many connections as requests at a time."""
    return httpx2.AsyncClient(
        base_url=server.url,
        headers=server.headers,
        timeout=httpx2.Timeout(CONNECT_S, read=SILENCE_S, pool=None),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


async def ask(
    http: httpx2.AsyncClient, endpoint: str, body: Mapping[str, Any], outcome: Outcome
) -> None:
    """Send a request and take in its stream; what became of it goes into `outcome`."""
    outcome.began = outcome.ended = time.perf_counter()
    try:
        async with http.sse(endpoint, method="POST", json=body) as events:
            if events.response.status_code != httpx2.codes.OK:
                await events.response.aread()
                outcome.error = refusal(events.response.status_code, events.response.text)
                return
            async for event in events:
                if event.data == "[DONE]":
                    outcome.finished = True
                    continue  # read to its end, the connection can be used again
                _take(json.loads(event.data), outcome)
                if outcome.error is not None:
                    return
            if not outcome.finished:
                outcome.error, outcome.gone = "the stream ended before its end", True
    except httpx2.TransportError as error:
        outcome.error = f"{type(error).__name__}: {cause(error)}"
        outcome.gone = True
    except ValueError as error:
        outcome.error = f"an event is no JSON: {cause(error)}"


def _take(event: dict[str, Any], outcome: Outcome) -> None:
    now = time.perf_counter()
    outcome.error = stream_error(event)
    usage = event.get("usage")
    if usage:
        outcome.counted = usage.get("completion_tokens", outcome.counted)
        outcome.prompt_tokens = usage.get("prompt_tokens", outcome.prompt_tokens)
    choices = event.get("choices")
    if not choices:
        return
    outcome.ended = now
    choice = choices[0]
    outcome.finished |= choice.get("finish_reason") is not None
    text = choice.get("text") or (choice.get("delta") or {}).get("content")
    if text:
        outcome.arrived.append(now)
        outcome.text += text


async def served_model(http: httpx2.AsyncClient, server: RemoteServer) -> str:
    """The first model that a server names.

    Raises:
        RunError: it cannot be reached, or names none.
    """
    try:
        answer = await http.get(MODELS)
    except httpx2.TransportError as error:
        raise server.unreachable(error) from None
    if answer.status_code != httpx2.codes.OK:
        said = refusal(answer.status_code, answer.text)
        hint = "set OPENAI_API_KEY to its key" if answer.status_code == 401 else ""
        raise RunError(lines(f"the server {server.url} refuses {MODELS}: {said}", hint))
    try:
        return first_model(answer.json())
    except json.JSONDecodeError:
        raise RunError(lines(f"the server {server.url} answered {MODELS} with no JSON")) from None


async def is_there(http: httpx2.AsyncClient) -> bool:
    """Whether a server takes connections at all."""
    try:
        await http.get(MODELS)
    except httpx2.TransportError:
        return False
    return True
