"""Who may ask: keys, and the Host header."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .limits import HEADER_BYTES

OPEN = {"/", "/health", "/live", "/version", "/openapi.json", "/docs"}
OPEN_FOLDER = "/page/"
"""Files of the page, which hold nothing of the model."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """Who may ask.

    Attributes:
        keys: of which a request has to show one; none are asked for if empty.
        hosts: names in the Host header that are taken; any if None.
    """

    keys: Sequence[str] = field(default=(), repr=False)
    hosts: Collection[str] | None = None


class Access:
    """Lets through what the rules allow."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._keys = [key.encode() for key in rules.keys]
        self._hosts = None if rules.hosts is None else {name.lower() for name in rules.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(scope) if scope["type"] == "http" else None
        if refused is None:
            await self._app(scope, receive, send)
        else:
            await refused.response()(scope, receive, send)

    def _refused(self, scope: Scope) -> ApiError | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            text = f"the headers have more than {HEADER_BYTES} bytes"
            return ApiError(text, code="headers_too_large", closes=True)
        headers = Headers(scope=scope)
        if self._hosts is not None and _name_of(headers.get("host", "")) not in self._hosts:
            # A page of another name that resolves to this machine (DNS rebinding).
            text = (
                f"the Host header is {headers.get('host', '')[:200]!r}: --allowed-host adds names"
            )
            return ApiError(text, code="host_not_allowed")
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not self._keys or path in OPEN or path.startswith(OPEN_FOLDER):
            return None
        shown = headers.get("authorization", "").encode()
        kind, _, key = shown.partition(b" ")
        # Every key is compared, so that the time says nothing.
        good = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if kind.lower() == b"bearer" and any(good):
            return None
        said = "the API key is wrong" if shown else "an API key is needed"
        text = f"{said}: expected the header Authorization: Bearer KEY"
        return ApiError(text, status=401, code="invalid_api_key")


def _name_of(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.strip().lower().rpartition(":")
    return name if colon and port.isdecimal() else host.strip().lower()
