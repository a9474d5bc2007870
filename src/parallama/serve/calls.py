"""What every call has in common: its body, the model it is for, and how it is answered."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..errors import ParallamaError, QueueFullError
from ..inference.requests import Request as EngineRequest
from .answers import Usage, usage_of
from .errors import ApiError, of_ours, of_validation
from .limits import BodyLimits, read_json
from .metrics import Metrics
from .protocol import Body, Sampled, StreamOptions
from .running import Mailbox, Running
from .served_model import ServedModel

LOGGER = logging.getLogger("parallama")
B = TypeVar("B", bound=Body)
T = TypeVar("T")
_NAMES = 100
"""Unknown fields that are logged in a process's life, each once."""


@dataclass(kw_only=True)
class Door:
    """What the routes have in common.

    Attributes:
        version: ours.
        body: limits of a request's body.
        served: None until the model is loaded.
        stopping: no new requests are taken.
        mailbox: of the event loop, from its start.
        metrics: None without them.
        unknown: fields that were logged.
    """

    version: str = ""
    body: BodyLimits = field(default_factory=BodyLimits)
    served: ServedModel | None = None
    stopping: bool = False
    mailbox: Mailbox | None = None
    metrics: Metrics | None = None
    unknown: set[str] = field(default_factory=set)

    def ready(self) -> ServedModel:
        """The model, if it takes requests.

        Raises:
            ApiError: it doesn't, or not yet.
        """
        served = self.served
        state = "starting" if served is None else served.serving.state()
        if self.stopping and state != "dead":
            state = "stopping"
        if served is None or state != "ready":
            said = "the engine has failed" if state == "dead" else f"the server is {state}"
            raise ApiError(said, status=503, code=f"engine_{state}")
        return served


def door_of(request: Request) -> Door:
    """What the routes have in common."""
    found: Door = request.app.state.door
    return found


async def body_of(request: Request, kind: type[B]) -> tuple[B, ServedModel]:
    """The body of a call, and the model that it is for.

    Raises:
        ApiError: the body is wrong, or the model isn't there.
    """
    door = door_of(request)
    served = door.ready()
    given = await read_json(request, door.body)
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise of_validation(error, given) from None
    served.check_name(getattr(body, "model", None))
    _check_fields(body, door)
    return body, served


def _check_fields(body: Body, door: Door) -> None:
    """Refuse what we can't do, and log what nobody knows."""
    for name, value in (body.model_extra or {}).items():
        if name in body.NOT_SUPPORTED:
            if value not in body.NOT_SUPPORTED[name]:
                raise ApiError(f"{name} is not supported", param=name, code="unsupported_parameter")
        elif name not in body.NO_EFFECT and len(door.unknown) < _NAMES and name not in door.unknown:
            door.unknown.add(name)
            LOGGER.warning("a request has a field that isn't known, and is ignored: %.80r", name)


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """What `work` gives, in a thread: it takes long, or may.

    Raises:
        ApiError: it refuses.
    """
    try:
        return await run_in_threadpool(work, *arguments)
    except ParallamaError as error:
        raise of_ours(error) from None


def started(
    request: Request, asked: Sampled, served: ServedModel, requests: Sequence[EngineRequest]
) -> Running:
    """A call's requests, in the engine.

    Raises:
        ApiError: it doesn't take them.
    """
    door = door_of(request)
    assert door.mailbox is not None
    try:
        return Running(served.serving, door.mailbox, requests, asked.priority or 0)
    except ParallamaError as error:
        if isinstance(error, QueueFullError) and door.metrics is not None:
            door.metrics.rejected()
        raise of_ours(error) from None


def new_id(kind: str) -> tuple[str, int]:
    """An answer's id and time."""
    return f"{kind}-{uuid.uuid4().hex}", int(time.time())


@dataclass
class Counted:
    """Tokens of a call so far.

    Attributes:
        prompt: of its prompts.
        copies: requests of a prompt, which the engine computes once.
    """

    prompt: int
    copies: int
    new: int = 0
    cached: int = 0

    def add(self, number: int, tokens: int, cached: int) -> None:
        """Count an update of a request."""
        self.new += tokens
        if number % self.copies == 0:
            self.cached += cached

    def usage(self) -> Usage:
        """As the answer has it."""
        return usage_of(self.prompt, self.new, min(self.cached, self.prompt))


class ChunkUsage:
    """What of usage a stream's chunks have."""

    def __init__(self, options: StreamOptions | None, counted: Counted) -> None:
        self._counted = counted
        self.last = bool(options and options.include_usage)
        self._each = self.last and bool(options and options.continuous_usage_stats)

    def fields(self) -> dict[str, Any]:
        """For a chunk before the last."""
        if not self.last:
            return {}
        return {"usage": self._counted.usage() if self._each else None}


def event_stream(chunks: AsyncIterator[Mapping[str, Any]]) -> Response:
    """Server-sent events, the last of which is `[DONE]`. An error is an event, too."""

    async def events() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield event(chunk)
        except ApiError as error:
            yield event(error.body())
        except Exception:
            LOGGER.exception("a stream failed")
            yield event(ApiError("the server failed", status=500).body())
        yield b"data: [DONE]\n\n"

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def event(chunk: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n".encode(errors="replace")
