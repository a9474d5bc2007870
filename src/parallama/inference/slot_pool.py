"""Sessions with slots that the runs of a model share, one at a time each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from ..plan.program_shapes import run_slots, shortest_length
from .requests import Request
from .run_stats import RunStats
from .scheduler import Scheduler
from .slot_runner import SlotRunner
from .slot_shapes import SlotShapes
from .slots import SlotSession


class Maker(Protocol):
    """Makes a session with slots."""

    def __call__(self, shapes: SlotShapes) -> SlotSession: ...


class SlotPool:
    """Keeps the session of the last run for the next one, whose programs are then there.

    A session is made larger when a run needs more slots or positions, never smaller.

    Args:
        make: makes a session.
        max_model_len: most tokens of a request.
        slots: requests at a time, of all runs; at first only as many as the first one needs.
    """

    def __init__(self, make: Maker, *, max_model_len: int, slots: int) -> None:
        self._make, self._max_model_len, self.slots = make, max_model_len, slots
        self._lock = threading.Lock()
        self._idle: SlotSession | None = None
        self._least = (1, 1)

    def take(
        self,
        requests: Sequence[Request],
        *,
        shards: int,
        max_num_seqs: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> SlotRunner:
        """A session for a run, with every program that it needs.

        Args:
            requests: all of the run.
            shards: size of the mesh's data axis.
            max_num_seqs: most requests at a time.
            progress: called with programs compiled and their number.
        """
        at_once = min(len(requests), max_num_seqs or self.slots)
        positions = max(len(request.ids) + request.limit for request in requests)
        prompts = [len(request.ids) for request in requests]
        copies = any(request.index for request in requests)
        scored = any(request.choosing.scored is not None for request in requests)
        with self._lock:
            slots, longest = self._least
            slots = max(slots, run_slots(at_once, self.slots))
            longest = max(longest, shortest_length(positions, self._max_model_len))
            self._least = slots, longest
            session, self._idle = self._idle, None
        shapes = SlotShapes.of(slots=slots, positions=longest, shards=shards)
        if session is not None and (
            (session.shapes.slots, session.shapes.length) != (shapes.slots, shapes.length)
        ):
            session = None  # its cache is freed before there is another
        if session is None:
            session = self._make(shapes)
        session.stats = RunStats()
        covering = session.shapes.covering(at_once, prompts, copies=copies, scored=scored)
        session.prepare(covering, progress)
        scheduler = Scheduler(
            session, at_once=at_once, prefix_caching=copies, copying=session.shapes.copies
        )
        return SlotRunner(session, scheduler)

    def give_back(self, runner: SlotRunner) -> None:
        """Let the next run have a session; all its requests are over."""
        with self._lock:
            self._idle = runner.session

    def clear(self) -> None:
        """Let go of the idle session, and its cache."""
        with self._lock:
            self._idle = None
