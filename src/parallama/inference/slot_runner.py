"""Requests on slots, one round after the other: what a scheduler says, a session does."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from .choosing import Choosing
from .run_stats import Choice
from .scheduler import Admitted, Round, Scheduler
from .slots import SlotSession


class SlotRunner:
    """Requests that share a session. For one thread, but that any may `add` a request.

    Args:
        session: which nobody else uses meanwhile.
        scheduler: made for it.
    """

    def __init__(self, session: SlotSession, scheduler: Scheduler) -> None:
        self.session, self.scheduler = session, scheduler
        self._lock = threading.Lock()
        self._asked: dict[int, tuple[Sequence[int], Choosing]] = {}
        self._by_slot: dict[int, int] = {}
        self.admitted: list[Admitted] = []
        """Of the last round."""

    def add(self, request: int, ids: Sequence[int], choosing: Choosing, priority: int = 0) -> None:
        """Queue a request; see `Scheduler.add`."""
        with self._lock:
            self.scheduler.add(request, ids, priority, computed=choosing.scored is not None)
            self._asked[request] = ids, choosing

    def end(self, request: int) -> None:
        """Choose nothing more for a request, whether it waits or runs."""
        with self._lock:
            self._asked.pop(request, None)
            slot = self.scheduler.end(request)
        if slot is not None:
            self._by_slot.pop(slot, None)
            self.session.evict(slot)

    def round(self) -> list[tuple[int, Choice]]:
        """Do what is next: a decode step, then at most one chunk of a prompt a data shard.

        Returns:
            The token that each request has got. There may be none while a prompt goes on.
        """
        with self._lock:
            todo = self.scheduler.next_round()
        self.admitted = []
        if todo is None:
            return []
        self._move(todo)
        chosen: list[tuple[int, Choice]] = []
        if todo.decode:
            found = self.session.decode()
            chosen += [(self._by_slot[slot], choice) for slot, choice in found.items()]
        if todo.prefill:
            asked = {self._slot(request): self._asked[request][0] for request in todo.prefill}
            for slot, choice in self.session.prefill(asked).items():
                self.scheduler.began(self._by_slot[slot])
                chosen.append((self._by_slot[slot], choice))
        return chosen

    def _move(self, todo: Round) -> None:
        for move in todo.moves:
            if isinstance(move, Admitted):
                self._by_slot[move.slot] = move.request
                self.session.admit(move.slot, self._asked[move.request][1], move.cached)
                self.admitted.append(move)
            else:
                self.session.copy(move.source, move.target)
                if move.request is not None:
                    del self._by_slot[move.source]
                    self._by_slot[move.target] = move.request
                    self.session.evict(move.source)

    def _slot(self, request: int) -> int:
        slot = self.scheduler.slot_of(request)
        assert slot is not None
        return slot
