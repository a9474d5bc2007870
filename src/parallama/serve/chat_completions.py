"""`/v1/chat/completions`: conversations answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..inference.serving import Update
from .answers import Chat, ChatChoice, ChatChunkChoice, ChatLogprobs, chat_logprobs, prompt_logprobs
from .calls import ChunkUsage, Counted, body_of, event_stream, in_thread, new_id, started
from .errors import ApiError
from .protocol import ChatRequest
from .running import Running, while_connected, whole
from .served_model import ServedModel


class _Call:
    """A call, checked."""

    def __init__(self, asked: ChatRequest, served: ServedModel, ids: list[int]) -> None:
        self.asked, self.served, self.ids = asked, served, ids
        self.n = asked.n or 1
        limit = asked.max_completion_tokens or asked.max_tokens
        self.requests = served.requests(
            [(None, ids)],
            asked,
            copies=self.n,
            limits=[served.limit(ids, limit, None, of="messages")],
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            prompt_logprobs=asked.prompt_logprobs,
            answers=True,
        )
        self.counted = Counted(len(ids), self.n)
        self.id, self.created = new_id("chatcmpl")

    def logprobs(self, update: Update) -> ChatLogprobs | None:
        """Those of an update's tokens, if they were asked for."""
        if not self.asked.logprobs:
            return None
        as_ids = bool(self.asked.return_tokens_as_token_ids)
        return chat_logprobs(self.served.texts, update.logprobs, as_ids)

    def of_prompt(self, update: Update) -> dict[str, Any]:
        """What an answer says of the prompt, if it was asked for."""
        found: dict[str, Any] = {}
        if self.asked.prompt_logprobs is not None and update.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(self.served.texts, update.prompt_logprobs)
        if self.asked.return_token_ids:
            found["prompt_token_ids"] = self.ids
        return found

    def tokens(self, update: Update) -> dict[str, Any]:
        """An update's token ids, if they were asked for."""
        return {"token_ids": list(update.token_ids)} if self.asked.return_token_ids else {}

    def head(self) -> dict[str, Any]:
        """What every answer and chunk begins with."""
        return {"id": self.id, "created": self.created, "model": self.served.name}


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    asked, served = await body_of(request, ChatRequest)
    _check(asked)
    ids = await in_thread(served.rendered, asked)
    call = await in_thread(_Call, asked, served, ids)
    running = started(request, asked, served, call.requests)
    if asked.stream:
        return event_stream(_chunks(call, running))
    return JSONResponse(await while_connected(request, lambda: _answer(call, running)))


def _check(asked: ChatRequest) -> None:
    choice = (asked.model_extra or {}).get("tool_choice")
    if (asked.tools and choice != "none") or choice not in (None, "none", "auto"):
        raise ApiError(
            "tools are not called: expected none, or tool_choice 'none', which shows them to the"
            " model",
            param="tools" if asked.tools else "tool_choice",
            code="unsupported_parameter",
        )
    if asked.top_logprobs is not None and not asked.logprobs:
        text = f"top_logprobs is {asked.top_logprobs} without logprobs: expected both"
        raise ApiError(text, param="top_logprobs")
    if asked.continue_final_message and asked.messages[-1].role != "assistant":
        text = "continue_final_message needs a last message of the assistant's"
        raise ApiError(text, param="continue_final_message")


async def _answer(call: _Call, running: Running) -> Chat:
    updates = await whole(running, call.n)
    choices: list[ChatChoice] = []
    for number, update in enumerate(updates):
        call.counted.add(number, len(update.token_ids), update.cached_tokens)
        choices.append(
            {
                "index": number,
                "message": {"role": "assistant", "content": update.text, "refusal": None},
                "logprobs": call.logprobs(update),
                "finish_reason": "stop" if update.finish_reason == "stop" else "length",
                "stop_reason": update.stop_reason,
                **call.tokens(update),  # type: ignore[typeddict-item]
            }
        )
    answer = {
        **call.head(),
        "object": "chat.completion",
        "choices": choices,
        "usage": call.counted.usage(),
        **call.of_prompt(updates[0]),
    }
    return answer  # type: ignore[return-value]


async def _chunks(call: _Call, running: Running) -> AsyncGenerator[Mapping[str, Any], None]:
    usage = ChunkUsage(call.asked.stream_options, call.counted)
    head = {**call.head(), "object": "chat.completion.chunk"}
    begun: set[int] = set()
    async with aclosing(running.updates()) as updates:
        async for number, update in updates:
            call.counted.add(number, len(update.token_ids), update.cached_tokens)
            if number not in begun:
                begun.add(number)
                first: ChatChunkChoice = {
                    "index": number,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
                yield {**head, "choices": [first], **call.of_prompt(update), **usage.fields()}
            if choice := _part(call, number, update):
                yield {**head, "choices": [choice], **usage.fields()}
    if usage.last:
        yield {**head, "choices": [], "usage": call.counted.usage()}


def _part(call: _Call, number: int, update: Update) -> ChatChunkChoice | None:
    """The chunk of an update, if it says something."""
    logprobs = call.logprobs(update)
    tokens = call.tokens(update)
    if not (
        update.text
        or update.finish_reason
        or tokens.get("token_ids")
        or (logprobs and logprobs["content"])
    ):
        return None
    reason = update.finish_reason
    choice: ChatChunkChoice = {
        "index": number,
        "delta": {"content": update.text} if update.text else {},
        "logprobs": logprobs,
        "finish_reason": reason if reason in ("stop", "length") else None,
        **tokens,  # type: ignore[typeddict-item]
    }
    if reason is not None:
        choice["stop_reason"] = update.stop_reason
    return choice
