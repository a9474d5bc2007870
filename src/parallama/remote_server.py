"""An OpenAI-compatible server somewhere else: its address, key and refusals. Pure.

What talks to it brings the HTTP client.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .errors import RunError, UsageError, cause, lines

COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"


@dataclass(frozen=True, kw_only=True)
class RemoteServer:
    """A server's address.

    Attributes:
        url: without `/v1` and what follows it.
        api_key: sent with every request, unless it is None.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> RemoteServer:
        """From an address as people write it, with or without `/v1` or an endpoint.

        Raises:
            UsageError: it is none.
        """
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of a port or an IPv6 address
            known = False
        if not known:
            raise UsageError(
                lines(f"{url!r} is no server's address", "expected one as http://127.0.0.1:8000")
            )
        for path in (COMPLETIONS, CHAT, MODELS, "/v1"):
            url = url.rstrip("/").removesuffix(path)
        return cls(url=url.rstrip("/"), api_key=api_key or None)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def unreachable(self, error: BaseException) -> RunError:
        """The error for a server that cannot be talked to."""
        return RunError(
            lines(f"the server {self.url} cannot be reached: {cause(error)}", "is it running?")
        )


def is_address(text: str) -> bool:
    """Whether something is meant for a server's address, and for no model."""
    return text.startswith(("http://", "https://"))


def refusal(status: int, body: str) -> str:
    """What a server says with an answer that is not 200, in one line."""
    return f"{status}: {_message(body) or 'no reason given'}"


def stream_error(event: dict[str, Any]) -> str | None:
    """What an event of a stream says went wrong, or None."""
    error = event.get("error")
    return None if error is None else _message(json.dumps(event)) or "no reason given"


def first_model(document: Any) -> str:
    """The first name of the answer of `/v1/models`.

    Raises:
        RunError: there is none.
    """
    models = document.get("data") if isinstance(document, dict) else None
    first = models[0] if isinstance(models, list) and models else None
    name = first.get("id") if isinstance(first, dict) else None
    if not isinstance(name, str):
        raise RunError(
            lines("the server names no model at /v1/models", "give its name with the command")
        )
    return name


def _message(body: str) -> str:
    """The message in an error's body: OpenAI's and vLLM's form, FastAPI's, or a text."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = body
    for key in ("error", "message", "detail"):
        if isinstance(document, dict) and key in document:
            document = document[key]
    return " ".join(str(document).split())[:200]
