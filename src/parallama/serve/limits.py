"""What one request may hold, and how long it may take to come. Pure."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pydantic_core
from starlette.requests import ClientDisconnect, Request

from ..plan.program_shapes import MOST_TOP
from .errors import ApiError

BODY_BYTES = 2 << 20
HEADER_BYTES = 16 << 10
HEADER_S = 10.0
"""How long a request's line and headers may take."""
BODY_S = 30.0
SEND_S = 30.0
"""How long a client may leave what was sent unread."""
IDLE_S = 30.0
"""How long a connection is kept without a request."""
PROMPTS = 64
N = 16
STOPS, STOP_LETTERS = 16, 256
BIASES = 300
IDS = 1024
"""Token ids in a list of them, and words of `bad_words`."""
MESSAGES = 4096
LOGPROBS = MOST_TOP
DEPTH = 32


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """What a body may hold, and how long it may take to come."""

    bytes: int = BODY_BYTES
    seconds: float = BODY_S


async def read_json(request: Request, limits: BodyLimits) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        ApiError: it is too long, too slow, too deep, or no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Others can be sent by any web page that a browser shows, without asking.
        raise ApiError(f"the content type is {kind[:80]!r}: expected application/json")
    try:
        async with asyncio.timeout(limits.seconds):
            body = await _body(request, limits.bytes)
    except TimeoutError:
        text = f"the body did not come within {limits.seconds:g} s"
        raise ApiError(text, status=408, code="request_timeout", closes=True) from None
    return parsed(body)


async def _body(request: Request, most: int) -> bytes:
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > most:
        raise _too_long(most)
    parts = bytearray()
    try:
        async for part in request.stream():
            parts += part
            if len(parts) > most:
                raise _too_long(most)
    except ClientDisconnect:
        raise ApiError("the client is gone", closes=True) from None
    return bytes(parts)


def _too_long(most: int) -> ApiError:
    text = f"the body has more than {most} bytes"
    return ApiError(text, status=413, code="request_too_large", closes=True)


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are.

    Raises:
        ApiError: they are something else, or nested too deep.
    """
    try:
        # Refuses NaN, infinities, half characters and 200 levels.
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(f"the body is a JSON {type(given).__name__}: expected an object")
    if _depth(given) > DEPTH:
        raise ApiError(f"the body is nested more than {DEPTH} levels deep")
    return given


def _depth(given: Any) -> int:
    """How many levels of objects and lists there are."""
    level, depth = [given], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > DEPTH:
            break
        level = [
            member
            for each in level
            for member in (each.values() if isinstance(each, dict) else each)
            if isinstance(member, (dict, list))
        ]
    return depth
