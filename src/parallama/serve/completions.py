"""`/v1/completions`: texts continued."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..inference.serving import TokenLogprob, Update
from .answers import Completion, CompletionChoice, completion_logprobs, prompt_logprobs
from .calls import ChunkUsage, Counted, body_of, event_stream, in_thread, new_id, started
from .errors import ApiError
from .protocol import CompletionRequest
from .running import Running, while_connected, whole
from .served_model import ServedModel

DEFAULT_TOKENS = 16
"""OpenAI's."""
Prompts = Sequence[tuple[str | None, list[int]]]


class _Call:
    """A call, checked.

    Args:
        prompts: texts, where they were given so, and token ids.
    """

    def __init__(self, asked: CompletionRequest, served: ServedModel, prompts: Prompts) -> None:
        _check(asked)
        self.asked, self.served = asked, served
        self.n = asked.n or 1
        self.copies = max(self.n, asked.best_of or 1)
        limits = [
            served.limit(ids, asked.max_tokens, DEFAULT_TOKENS, of="prompt") for _, ids in prompts
        ]
        compared = 0 if self.copies > self.n else None
        self.requests = served.requests(
            prompts,
            asked,
            copies=self.copies,
            limits=limits,
            logprobs=compared if asked.logprobs is None else asked.logprobs,
            prompt_logprobs=_of_prompt(asked),
        )
        self.counted = Counted(sum(len(ids) for _, ids in prompts), self.copies)
        self.begun: set[int] = set()
        self.letters = [0] * len(self.requests)
        self.id, self.created = new_id("cmpl")

    def count(self, number: int, update: Update) -> None:
        """Count an update's tokens."""
        new = len(update.token_ids) if self.asked.max_tokens != 0 else 0
        self.counted.add(number, new, update.cached_tokens)

    def choice(self, number: int, update: Update) -> CompletionChoice:
        """What an update says of its completion."""
        asked, first = self.asked, number not in self.begun
        self.begun.add(number)
        if asked.max_tokens == 0:  # the prompt alone was asked for
            update = Update(
                finish_reason=update.finish_reason and "length",
                prompt_logprobs=update.prompt_logprobs,
            )
        reason = update.finish_reason
        echoed = first and bool(asked.echo)
        choice: CompletionChoice = {
            "index": number // self.copies * self.n + number % self.copies,
            "text": (self._prompt(number) if echoed else "") + update.text,
            "logprobs": None,
            "finish_reason": reason if reason in ("stop", "length") else None,
            "stop_reason": update.stop_reason,
        }
        if asked.logprobs is not None:
            choice["logprobs"] = self._logprobs(number, update, echoed)
        if asked.prompt_logprobs is not None and update.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self.served.texts, update.prompt_logprobs)
        if asked.return_token_ids:
            choice["token_ids"] = list(update.token_ids)
            if first:
                choice["prompt_token_ids"] = self.requests[number].ids
        return choice

    def _prompt(self, number: int) -> str:
        """The text of a request's prompt."""
        request, tokenizer = self.requests[number], self.served.serving.llm.tokenizer
        if request.prompt is not None or tokenizer is None:
            return request.prompt or ""
        return str(tokenizer.decode(request.ids, skip_special_tokens=False))

    def _logprobs(self, number: int, update: Update, echoed: bool) -> Any:
        scored: list[tuple[int, TokenLogprob | None]] = []
        if echoed:
            ids = self.requests[number].ids
            scored += zip(ids, update.prompt_logprobs or [None] * len(ids), strict=True)
        scored += [(each.token, each) for each in update.logprobs]
        as_ids = bool(self.asked.return_tokens_as_token_ids)
        texts = self.served.texts
        made = completion_logprobs(texts, scored, self.letters[number], as_ids)
        self.letters[number] += texts.letters([token for token, _ in scored])
        return made

    def body(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        """An answer, or a chunk of one."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
            **more,  # type: ignore[typeddict-item]
        }

    def best(self, updates: Sequence[Update]) -> list[tuple[int, Update]]:
        """Of each prompt's copies the `n` likeliest, by the mean of their tokens."""
        found: list[tuple[int, Update]] = []
        for first in range(0, len(updates), self.copies):
            of_prompt = list(updates[first : first + self.copies])
            if self.copies > self.n:
                of_prompt.sort(key=_likelihood, reverse=True)
            found += [(first + place, each) for place, each in enumerate(of_prompt[: self.n])]
        return found


def _check(asked: CompletionRequest) -> None:
    n, best_of = asked.n or 1, asked.best_of
    if best_of is not None and (best_of < n or (best_of > n and asked.stream)):
        text = f"best_of is {best_of} and n {n}: expected at least as many, and no more in a stream"
        raise ApiError(text, param="best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError("max_tokens is 0: expected at least 1 without echo", param="max_tokens")


def _of_prompt(asked: CompletionRequest) -> int | None:
    """Likeliest tokens in each place of the prompt; None if it isn't to be scored."""
    echoed = asked.logprobs if asked.echo else None
    found = [count for count in (asked.prompt_logprobs, echoed) if count is not None]
    return max(found, default=None)


def _likelihood(update: Update) -> float:
    return sum(each.logprob for each in update.logprobs) / max(len(update.logprobs), 1)


async def completions(request: Request) -> Response:
    """Continue texts."""
    asked, served = await body_of(request, CompletionRequest)
    prompts = await in_thread(_prompts, asked, served)
    call = await in_thread(_Call, asked, served, prompts)
    running = started(request, asked, served, call.requests)
    if asked.stream:
        return event_stream(_chunks(call, running))
    return JSONResponse(await while_connected(request, lambda: _answer(call, running)))


def _prompts(asked: CompletionRequest, served: ServedModel) -> Prompts:
    """The prompts' texts, where they were given so, and token ids."""
    given: Any = asked.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    return [
        (each if isinstance(each, str) else None, served.encoded(each, asked.add_special_tokens))
        for each in given
    ]


async def _answer(call: _Call, running: Running) -> Completion:
    updates = await whole(running, len(call.requests))
    for number, update in enumerate(updates):
        call.count(number, update)
    choices = [call.choice(number, update) for number, update in call.best(updates)]
    return call.body(choices, usage=call.counted.usage())


async def _chunks(call: _Call, running: Running) -> AsyncGenerator[Mapping[str, Any], None]:
    usage = ChunkUsage(call.asked.stream_options, call.counted)
    async with aclosing(running.updates()) as updates:
        async for number, update in updates:
            call.count(number, update)
            choice = call.choice(number, update)
            if _says_something(choice):
                yield call.body([choice], **usage.fields())
    if usage.last:
        yield call.body([], usage=call.counted.usage())


def _says_something(choice: CompletionChoice) -> bool:
    logprobs = choice["logprobs"]
    return bool(
        choice["text"]
        or choice["finish_reason"]
        or choice.get("token_ids")
        or choice.get("prompt_logprobs")
        or (logprobs and logprobs["tokens"])
    )
