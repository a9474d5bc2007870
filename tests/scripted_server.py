"""A server of OpenAI's interface, over real HTTP, whose answers and their timing a test writes."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a request is answered with.

    Attributes:
        texts: of the chunks.
        first_s, next_s: pause before the first chunk, and before each other.
        usage: whether the last chunk counts the tokens.
        prompt_tokens: what that says of the prompt.
        breaks: the connection is cut after the chunks.
        error: an error is sent within the stream, after the chunks.
        status, body: of an answer that is none.
    """

    texts: tuple[str, ...] = ("a ", "b ", "c ")
    first_s: float = 0.0
    next_s: float = 0.0
    usage: bool = True
    prompt_tokens: int = 5
    breaks: bool = False
    error: str | None = None
    status: int = 200
    body: dict[str, Any] = field(default_factory=dict)


Script = Callable[[dict[str, Any], int], Reply]
"""The reply to a request's body; the number says how many requests came before it."""


class ScriptedServer:
    """`with ScriptedServer(script) as server:` serves at `server.url`.

    Attributes:
        asked: the bodies of all requests, in the order in which they came.
        headers: of all requests.
        most: requests that were answered at the same time, at most.
    """

    def __init__(self, script: Script = lambda _body, _number: Reply(), model: str = "scripted"):
        self._script, self._model = script, model
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._now = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    async def _models(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        return JSONResponse({"object": "list", "data": [{"id": self._model, "object": "model"}]})

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, lambda text: {"index": 0, "text": text})

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, lambda text: {"index": 0, "delta": {"content": text}})

    async def _answer(self, request: Request, choice: Callable[[str], Any]) -> Response:
        body, number = await request.json(), len(self.asked)
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        reply = self._script(body, number)
        if reply.status != 200:
            return JSONResponse(reply.body, reply.status)
        return StreamingResponse(self._events(reply, choice), media_type="text/event-stream")

    async def _events(self, reply: Reply, choice: Callable[[str], Any]) -> AsyncIterator[str]:
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            for number, text in enumerate(reply.texts):
                await asyncio.sleep(reply.next_s if number else reply.first_s)
                yield _event({"choices": [choice(text)]})
            if reply.breaks:
                raise ConnectionResetError
            if reply.error is not None:
                yield _event({"error": {"message": reply.error, "type": "server_error"}})
            if reply.usage:
                prompt, tokens = reply.prompt_tokens, len(reply.texts)
                counts = {"prompt_tokens": prompt, "completion_tokens": tokens}
                yield _event({"choices": [], "usage": counts | {"total_tokens": prompt + tokens}})
            yield "data: [DONE]\n\n"
        finally:
            self._now -= 1

    def stop(self) -> None:
        """Stop at once: connections are cut."""
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
