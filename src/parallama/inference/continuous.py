"""An engine for servers: one thread owns the devices, another one makes texts of their tokens.

Neither waits for whoever asked. Requests come in by a queue, texts go out by callbacks.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import EngineStoppedError, QueueFullError, lines
from ..notices import LOGGER
from ..plan.program_shapes import MAX_NUM_SEQS, SLOT_CHUNKS
from .completion import Row
from .llm import LLM
from .requests import Request
from .run_stats import Choice
from .scheduler import Scheduler
from .serving import EndReason, Load, Observer, State, Update
from .slot_runner import SlotRunner
from .slot_shapes import SlotShapes

_IDLE_S = 0.1
"""How long the devices' thread sleeps at most when there is nothing to do."""

Deliver = Callable[[Update], None]


@dataclass
class Asked:
    """A request that is waiting or running; a `serving.Ticket`.

    Attributes:
        row: its text so far; the texts' thread's.
        arrived, last: when it came, and when it got its last token; `time.perf_counter`.
        reason: why it is over, once that is known.
    """

    name: int
    request: Request
    deliver: Deliver
    row: Row
    engine: ContinuousEngine
    arrived: float
    last: float = 0.0
    tokens: int = 0
    cached: int = 0
    reason: EndReason | None = None

    def cancel(self) -> None:
        """See `serving.Ticket`."""
        self.engine.end(self, "abort")


@dataclass
class _Observers:
    all: list[Observer] = field(default_factory=list)

    def __call__(self, method: str, *arguments: object) -> None:
        for observer in self.all:
            getattr(observer, method)(*arguments)


class ContinuousEngine:
    """Answers many requests at a time; a `serving.Serving`.

    Args:
        llm: the model, which nobody else runs meanwhile.
        max_num_seqs: requests that run at a time.
        max_num_queued_reqs, max_num_queued_tokens: most that wait, if there is a limit.
        chunk: most positions of a prompt that are computed between two steps of the others.
        prefix_caching: prompts go on from what slots hold of earlier ones.
        progress: called with programs compiled and their number.

    Every program is compiled by `start`, and none later.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_num_queued_reqs: int | None = 128,
        max_num_queued_tokens: int | None = None,
        chunk: int = SLOT_CHUNKS[-1],
        prefix_caching: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.llm = llm
        sizes = (*(size for size in SLOT_CHUNKS if size < chunk), chunk)
        shards = llm.mesh.shape.data
        shapes = SlotShapes.of(
            slots=max_num_seqs, positions=llm.max_model_len, shards=shards, sizes=sizes
        )
        session = llm.slot_session(shapes)
        self._progress = progress
        scheduler = Scheduler(
            session,
            at_once=max_num_seqs,
            prefix_caching=prefix_caching and not llm.steps.follows_span,
            copying=session.shapes.per_shard > 1,
            max_queued_requests=max_num_queued_reqs,
            max_queued_tokens=max_num_queued_tokens,
        )
        self._runner = SlotRunner(session, scheduler)
        self._state: State = "starting"
        self._names = itertools.count()
        self._lock = threading.Lock()
        self._asked: dict[int, Asked] = {}
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._texts: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tell = _Observers()
        self._load = Load(running=0, waiting=0, kv_usage=0.0, programs=0)
        self._devices = threading.Thread(target=self._run, name="devices", daemon=True)
        self._writer = threading.Thread(target=self._write, name="texts", daemon=True)

    # -- for other threads

    def start(self) -> None:
        """Compile every program, then take requests. Returns when they are taken.

        Raises:
            ParallamaError: a program can't be compiled.
        """
        session = self._runner.session
        session.prepare(session.shapes.complete(), self._progress)
        self._load = self._now()
        self._state = "ready"
        self._writer.start()
        self._devices.start()

    def submit(self, request: Request, deliver: Deliver, priority: int = 0) -> Asked:
        """See `serving.Serving`."""
        row = self.llm.row(request)
        with self._lock:
            if self._state != "ready":
                state = "stopping" if self._state == "stopping" else "not ready"
                raise EngineStoppedError(lines(f"the server is {state}", "it takes no requests"))
            asked = Asked(
                next(self._names), request, deliver, row, self, arrived=time.perf_counter()
            )
            self._asked[asked.name] = asked
            try:
                self._runner.add(asked.name, request.ids, request.choosing, priority)
            except QueueFullError:
                del self._asked[asked.name]
                raise
        self._events.put(lambda: None)  # wakes the devices' thread
        return asked

    def state(self) -> State:
        """See `serving.Serving`."""
        return self._state

    def load(self) -> Load:
        """See `serving.Serving`."""
        return self._load

    def observe(self, observer: Observer) -> None:
        """See `serving.Serving`."""
        self._tell.all.append(observer)

    def close(self, timeout: float) -> None:
        """See `serving.Serving`."""
        with self._lock:
            if self._state == "ready":
                self._state = "stopping"
        until = time.monotonic() + timeout
        while self._asked and time.monotonic() < until and self._devices.is_alive():
            time.sleep(0.01)
        for asked in list(self._asked.values()):
            self.end(asked, "abort")
        while self._asked and self._devices.is_alive() and time.monotonic() < until + 5:
            time.sleep(0.01)
        self._events.put(self._stop)
        if self._devices.is_alive():
            self._devices.join(5)
            self._writer.join(5)

    def end(self, asked: Asked, reason: EndReason) -> None:
        """End a request before its time; from any thread."""
        self._events.put(lambda: self._end(asked, reason))

    # -- the devices' thread

    def _stop(self) -> None:
        raise _StopError

    def _run(self) -> None:
        try:
            with self._failing():
                while True:
                    self._take_events()
                    self._round()
        except _StopError:
            pass
        finally:
            if self._state != "dead":
                self._state = "stopping"
            self._texts.put(None)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever goes wrong on the devices ends all requests, and the engine."""
        try:
            yield
        except _StopError:
            raise
        except Exception:
            self._state = "dead"
            LOGGER.exception("the engine has failed")
            for asked in list(self._asked.values()):
                self._finish(asked, "error")

    def _take_events(self) -> None:
        idle = not (self._runner.scheduler.running or self._runner.scheduler.waiting)
        try:
            if idle:
                self._events.get(timeout=_IDLE_S)()
            while True:
                self._events.get_nowait()()
        except queue.Empty:
            pass

    def _round(self) -> None:
        compiled = self._runner.session.stats.programs_after_warmup
        chosen = self._runner.round()
        now = time.perf_counter()
        for move in self._runner.admitted:
            asked = self._asked[move.request]
            asked.cached = move.cached
            self._tell("admitted", now - asked.arrived, len(asked.request.ids), move.cached)
        for name, choice in chosen:
            self._chosen(self._asked[name], choice, now)
        more = self._runner.session.stats.programs_after_warmup - compiled
        if more:
            self._tell("compiled", more)
        self._load = self._now()

    def _chosen(self, asked: Asked, choice: Choice, now: float) -> None:
        """A request has got a token: its text is made elsewhere, its end may be known here."""
        if asked.tokens:
            self._tell("token", now - asked.last)
        else:
            self._tell("first_token", now - asked.arrived)
        asked.tokens += 1
        asked.last = now
        self._texts.put(lambda: self._grow(asked, choice))
        if choice.token in asked.row.ends:
            self._finish(asked, "stop")
        elif asked.tokens >= asked.row.limit:
            self._finish(asked, "length")

    def _end(self, asked: Asked, reason: EndReason) -> None:
        if asked.reason is None:
            self._finish(asked, reason)

    def _finish(self, asked: Asked, reason: EndReason) -> None:
        """A request is over: its slot is free from here on."""
        asked.reason = reason
        self._runner.end(asked.name)
        with self._lock:
            self._asked.pop(asked.name, None)
        spent = time.perf_counter() - asked.arrived
        self._tell("ended", reason, spent, len(asked.request.ids), asked.tokens)
        if reason in ("abort", "error"):
            self._texts.put(lambda: self._cut(asked, reason))

    def _now(self) -> Load:
        scheduler, stats = self._runner.scheduler, self._runner.session.stats
        return Load(
            running=scheduler.running,
            waiting=scheduler.waiting,
            kv_usage=scheduler.usage,
            programs=stats.programs_compiled + stats.programs_after_warmup,
        )

    # -- the texts' thread

    def _write(self) -> None:
        while (job := self._texts.get()) is not None:
            try:
                job()
            except Exception:  # nobody else may suffer
                LOGGER.exception("a text could not be delivered")

    def _grow(self, asked: Asked, choice: Choice) -> None:
        """Make text of a token; a stop string in it ends the request."""
        row = asked.row
        if row.finish_reason is not None:  # a stop string came before this token
            return
        chunk = row.take(choice, 0.0)
        if row.finish_reason is not None:
            self.end(asked, "stop")
        asked.deliver(
            Update(
                text=chunk.text,
                token_ids=(chunk.token,),
                logprobs=() if asked.request.params.logprobs is None else (choice.scored,),
                finish_reason=chunk.finish_reason,
                stop_reason=row.stop_reason,
                cached_tokens=asked.cached,
                prompt_logprobs=choice.prompt,
            )
        )

    def _cut(self, asked: Asked, reason: EndReason) -> None:
        if asked.row.finish_reason is None:
            asked.row.finish_reason = "length"
            asked.deliver(Update(finish_reason=reason, cached_tokens=asked.cached))


class _StopError(Exception):
    """The devices' thread is to end."""
