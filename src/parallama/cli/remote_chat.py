"""`parallama chat --url`: a conversation with a model behind a server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2

from ..errors import RunError, UsageError, cause, lines
from ..remote_server import CHAT, MODELS, RemoteServer, first_model, refusal, stream_error

_GO_ON = {400, 413, 422, 429, 503}
"""Refusals after which another message may be answered."""
_TIMEOUT = httpx2.Timeout(10.0, read=600.0)  # a long prompt, or a queue, may take minutes


class RemoteChat:
    """A conversation with a server. The whole of it is sent with each message.

    Args:
        model: the name that the server knows it by; the first that it has if None.
        system: system message.
        asked: what else each request says: sampling, by OpenAI's and vLLM's names.

    Raises:
        RunError: the server cannot be reached, or refuses to say what models it has.

    Attributes:
        messages: what was said, as `{"role", "content"}`.
        tokens: of all answers, as far as the server counted them.
        seconds: that all answers took.
    """

    def __init__(
        self,
        server: RemoteServer,
        *,
        model: str | None,
        system: str | None,
        asked: Mapping[str, Any],
    ) -> None:
        self._server = server
        self._client = httpx2.Client(base_url=server.url, headers=server.headers, timeout=_TIMEOUT)
        self._asked = asked
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)
        self.tokens, self.seconds = 0, 0.0
        self.model = self._first_model() if model is None else model

    def _first_model(self) -> str:
        try:
            answer = self._client.get(MODELS)
            if answer.status_code != httpx2.codes.OK:
                raise self._refused(answer)
            return first_model(answer.json())
        except httpx2.TransportError as error:
            raise self._server.unreachable(error) from None
        except ValueError as error:
            if isinstance(error, RunError | UsageError):
                raise
            raise RunError(lines(f"the server {self._server.url} answered no JSON")) from None

    def send(self, content: str) -> Iterator[str]:
        """Say something; yields the answer as it comes and remembers both.

        Raises:
            UsageError: the server refuses the message. The conversation stays as it was.
            RunError: the server cannot be reached, or refuses for good, or breaks off.
        """
        asked = [*self.messages, {"role": "user", "content": content}]
        body = {
            "model": self.model,
            "messages": asked,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._asked,
        }
        began, answer = time.perf_counter(), ""
        try:
            with self._client.sse(CHAT, method="POST", json=body) as events:
                if events.response.status_code != httpx2.codes.OK:
                    events.response.read()
                    raise self._refused(events.response)
                for event in events:
                    if event.data == "[DONE]":
                        break
                    text = self._text(json.loads(event.data))
                    answer += text
                    yield text
        except httpx2.TransportError as error:
            raise self._server.unreachable(error) from None
        except json.JSONDecodeError as error:
            raise RunError(
                lines(f"the server {self._server.url} sent what is no JSON: {cause(error)}")
            ) from None
        self.seconds += time.perf_counter() - began
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _text(self, event: dict[str, Any]) -> str:
        problem = stream_error(event)
        if problem is not None:
            raise RunError(lines(f"the server broke the answer off: {problem}"))
        self.tokens += (event.get("usage") or {}).get("completion_tokens") or 0
        choices = event.get("choices") or [{}]
        return (choices[0].get("delta") or {}).get("content") or ""

    def _refused(self, answer: httpx2.Response) -> RunError | UsageError:
        kind = UsageError if answer.status_code in _GO_ON else RunError
        hint = "set OPENAI_API_KEY to its key" if answer.status_code == 401 else ""
        return kind(lines(f"the server refuses: {refusal(answer.status_code, answer.text)}", hint))

    def reset(self) -> None:
        """Start over, with the system message if there is one."""
        self.messages = list(self._system)

    def close(self) -> None:
        """Let go of its connections."""
        self._client.close()
