"""The routes, and what every answer goes through."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .access import Access, AccessRules
from .answers import Model, Models
from .calls import Door, door_of
from .chat_completions import chat_completions
from .completions import completions
from .errors import ApiError
from .page_routes import asset, docs, mesh, openapi, page
from .running import Mailbox
from .served_model import ServedModel
from .tokens import detokenize, tokenize

LOGGER = logging.getLogger("parallama")


async def models(request: Request) -> Response:
    """The models that are served."""
    served = door_of(request).ready()
    answer: Models = {"object": "list", "data": [_card(served, name) for name in served.names]}
    return JSONResponse(answer)


async def model(request: Request) -> Response:
    """One of the models."""
    served, name = door_of(request).ready(), request.path_params["name"]
    served.check_name(name)
    return JSONResponse(_card(served, name))


def _card(served: ServedModel, name: str) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "parallama",
        "root": served.serving.llm.name,
        "max_model_len": served.serving.llm.max_model_len,
    }


async def health(request: Request) -> Response:
    """Whether requests are taken: 200, or 503 with the reason."""
    door_of(request).ready()
    return JSONResponse({"status": "ready"})


async def live(_request: Request) -> Response:
    """Whether the process answers."""
    return JSONResponse({"status": "live"})


async def version(request: Request) -> Response:
    """Our version."""
    return JSONResponse({"version": door_of(request).version})


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    found = door_of(request).metrics
    if found is None:
        door_of(request).ready()
        raise ApiError("the server was started with --no-metrics", status=404)
    return Response(found.text(), media_type=CONTENT_TYPE_LATEST)


async def on_api_error(_request: Request, error: Exception) -> Response:
    """An error that we mean to answer with."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(_request: Request, error: Exception) -> Response:
    """An error of the router's: no such path or method."""
    assert isinstance(error, HTTPException)
    made = ApiError(error.detail, status=error.status_code).response()
    made.headers.update(error.headers or {})
    return made


async def on_fault(request: Request, error: Exception) -> Response:
    """A fault of ours."""
    LOGGER.error("a request to %s failed", request.url.path, exc_info=error)
    return ApiError("the server failed: its log says why", status=500).response()


def make_app(door: Door, rules: AccessRules) -> Starlette:
    """The application."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None, None]:
        door.mailbox = Mailbox(asyncio.get_running_loop())
        yield

    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/live", live),
            Route("/version", version),
            Route("/metrics", metrics),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/openapi.json", openapi),
            Route("/docs", docs),
            Route("/mesh", mesh),
            Route("/page/{name}", asset),
            Route("/", page),
        ],
        middleware=[Middleware(Access, rules=rules)],
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_error,
            Exception: on_fault,
        },
        lifespan=lifespan,
    )
    app.state.door = door
    return app
