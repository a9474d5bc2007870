"""An engine that answers one request after another, on a real model. For tests of the HTTP side."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from parallama.errors import EngineStoppedError, QueueFullError
from parallama.inference.requests import Request
from parallama.inference.serving import Load, Observer, State, TokenLogprob, Update


@dataclass
class Waiting:
    request: Request
    deliver: Callable[[Update], None]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class ContinuousEngine:
    def __init__(self, llm: Any, *, max_num_queued_reqs: int = 128, **_options: Any) -> None:
        self.llm = llm
        self._most = max_num_queued_reqs
        self._queue: queue.Queue[Waiting | None] = queue.Queue()
        self._observers: list[Observer] = []
        self._state: State = "ready"
        self._running = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Update], None]) -> Waiting:
        if self._state != "ready":
            raise EngineStoppedError(f"the engine is {self._state}")
        if self._queue.qsize() >= self._most:
            raise QueueFullError(f"{self._most} requests wait")
        made = Waiting(request, deliver)
        self._queue.put(made)
        return made

    def state(self) -> State:
        return self._state

    def load(self) -> Load:
        return Load(running=self._running, waiting=self._queue.qsize(), kv_usage=0.0, programs=1)

    def observe(self, observer: Observer) -> None:
        self._observers.append(observer)

    def close(self, timeout: float) -> None:
        self._state = "stopping"
        self._queue.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._state = "dead"
            self._thread.join(10)

    def _tell(self, what: str, *arguments: Any) -> None:
        for observer in self._observers:
            getattr(observer, what)(*arguments)

    def _work(self) -> None:
        while (waiting := self._queue.get()) is not None:
            self._running = 1
            try:
                self._answer(waiting)
            except Exception:
                import traceback

                traceback.print_exc()
                waiting.deliver(Update(finish_reason="error"))
                self._state = "dead"
            self._running = 0

    def _answer(self, waiting: Waiting) -> None:
        request = waiting.request
        last = began = time.monotonic()
        self._tell("admitted", began - waiting.arrived, len(request.ids), 0)
        tokens, reason = 0, "abort"
        wanted = getattr(request.params, "prompt_logprobs", None)
        scored = None if wanted is None else self._scores(request.ids, wanted)
        stream = () if waiting.cancelled else self.llm.chunks([request])
        for _, chunk, row in stream:
            tokens += 1
            now = time.monotonic()
            self._tell("first_token" if tokens == 1 else "token", now - last)
            last = now
            if waiting.cancelled or self._state == "dead":
                break
            stop = next((s for s in request.params.stop if row.stream.stopped), None)
            scores = (TokenLogprob(token=chunk.token, logprob=chunk.logprob),)
            asked = getattr(request.params, "logprobs", None) is not None
            update = Update(
                text=chunk.text,
                token_ids=(chunk.token,),
                logprobs=scores if asked else (),
                finish_reason=chunk.finish_reason,
                stop_reason=stop if chunk.finish_reason else None,
                prompt_logprobs=scored if tokens == 1 else None,
            )
            waiting.deliver(update)
            if chunk.finish_reason is not None:
                reason = chunk.finish_reason
        self._tell("ended", reason, time.monotonic() - waiting.arrived, len(request.ids), tokens)
        if reason == "abort":
            waiting.deliver(Update(finish_reason="abort"))

    def _scores(self, ids: list[int], most: int) -> tuple[TokenLogprob | None, ...]:
        table = torch.log_softmax(self.llm.logits(ids).double(), -1)
        found: list[TokenLogprob | None] = [None]
        for place, token in enumerate(ids[1:]):
            best = table[place].topk(max(most, 1))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))[:most]
            found.append(TokenLogprob(token=token, logprob=float(table[place, token]), top=top))
        return tuple(found)
