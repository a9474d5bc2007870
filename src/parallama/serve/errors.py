"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from ..errors import (
    CheckpointError,
    EngineStoppedError,
    ParallamaError,
    QueueFullError,
    UsageError,
    shown,
)

PLACES = 10
"""Wrong places of a body that a message names at most."""
RETRY_S = 1
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        param: the field that is wrong.
        code: a word for programs.
        closes: the connection is of no use any more.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.closes = closes

    def body(self) -> dict[str, Any]:
        """What the answer's body says."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer."""
        headers: dict[str, str] = {}
        if self.status in (429, 503):
            headers["retry-after"] = str(RETRY_S)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.closes:
            headers["connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


def of_validation(error: ValidationError, given: Any) -> ApiError:
    """What is wrong with a body, in its first ten places.

    Args:
        given: the body.
    """
    problems = error.errors(include_url=False, include_context=False)
    said = [f"{_place(each, given)}: {_expected(each)}" for each in problems]
    said = list(dict.fromkeys(said))
    more = f"\nand {len(said) - PLACES} more" if len(said) > PLACES else ""
    first = problems[0]["loc"]
    return ApiError("\n".join(said[:PLACES]) + more, param=str(first[0]) if first else None)


def _place(problem: Mapping[str, Any], given: Any) -> str:
    """`messages.0.content is 5`, without what pydantic adds about the kinds of a value."""
    found: list[str] = []
    value, missing = given, problem["type"] == "missing"
    for part in problem["loc"]:
        if _holds(value, part):
            value = value[part]
        elif not (missing and isinstance(value, dict)):
            continue
        found.append(str(part)[:80])
    place = ".".join(found) or "the body"
    return f"{place} is missing" if missing else f"{place} is {shown(problem['input'])}"


def _holds(value: Any, part: int | str) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _expected(problem: Mapping[str, Any]) -> str:
    said = str(problem["msg"]).removeprefix("Value error, ")
    return said[:1].lower() + said[1:300]


def of_ours(error: ParallamaError, param: str | None = None) -> ApiError:
    """An error of the engine's or of the text side's as an answer."""
    if isinstance(error, QueueFullError):
        return ApiError(str(error), status=429, code="rate_limit_exceeded")
    if isinstance(error, EngineStoppedError):
        return ApiError(str(error), status=503, code="engine_stopped")
    # A checkpoint's template or tokenizer that a request runs into the limits of.
    if isinstance(error, (UsageError, CheckpointError)):
        return ApiError(str(error), param=param)
    return ApiError(str(error), status=500)
