"""From the engine's threads to the event loop: what of a call's requests is new."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from ..inference.requests import Request
from ..inference.serving import Serving, Ticket, Update
from .errors import ApiError

T = TypeVar("T")
News = tuple[int, Update]


class Mailbox:
    """Takes updates in any thread, and hands them out in the event loop, which it wakes once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[asyncio.Queue[News], News]] = deque()
        self._called = False

    def post(self, queue: asyncio.Queue[News], number: int, update: Update) -> None:
        """Put an update into a queue of the event loop."""
        self._waiting.append((queue, (number, update)))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._called = False  # before the look: what comes meanwhile calls again
        while self._waiting:
            queue, news = self._waiting.popleft()
            queue.put_nowait(news)


class Running:
    """The requests of one call, all of which run or none.

    Args:
        priority: those of a smaller one go first.

    Raises:
        ParallamaError: the engine doesn't take them.
    """

    def __init__(
        self, serving: Serving, mailbox: Mailbox, requests: Sequence[Request], priority: int
    ) -> None:
        self._queue: asyncio.Queue[News] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._left = len(requests)
        try:
            for number, request in enumerate(requests):
                deliver = partial(mailbox.post, self._queue, number)
                self._tickets.append(serving.submit(request, deliver, priority))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what still runs."""
        for ticket in self._tickets:
            ticket.cancel()

    async def updates(self) -> AsyncGenerator[News, None]:
        """Each request's updates, with its number, until all have ended.

        Raises:
            ApiError: the engine failed, or ended a request on its own.
        """
        try:
            while self._left:
                number, update = await self._queue.get()
                if update.finish_reason in ("abort", "error"):
                    raise _broken_off(update)
                self._left -= update.finish_reason is not None
                yield number, update
        finally:
            if self._left:
                self.cancel()


def _broken_off(update: Update) -> ApiError:
    if update.finish_reason == "abort":
        return ApiError("the server is stopping", status=503, code="engine_stopped")
    return ApiError("the engine has failed", status=500, code="engine_failed")


async def while_connected(request: HttpRequest, work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives; it is cancelled when the client goes.

    Raises:
        ApiError: the client is gone, so that nobody reads it.
    """
    task = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError("the client is gone", status=499, closes=True)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def joined(parts: Sequence[Update]) -> Update:
    """A request's updates as one."""
    last = parts[-1]
    return Update(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(each for part in parts for each in part.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=max(part.cached_tokens for part in parts),
        prompt_logprobs=next((p.prompt_logprobs for p in parts if p.prompt_logprobs), None),
    )


async def whole(running: Running, count: int) -> list[Update]:
    """What each of `count` requests has come to."""
    parts: list[list[Update]] = [[] for _ in range(count)]
    async with aclosing(running.updates()) as updates:
        async for number, update in updates:
            parts[number].append(update)
    return [joined(each) for each in parts]
