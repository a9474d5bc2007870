"""Which request gets which slot, and what runs next. Pure.

Requests wait in the order they came in, those of a smaller `priority` first. One that has a slot is
prefilled chunk by chunk, with a decode step of all others after each chunk, so that no prompt holds
them up for longer. What a slot held before stays, and a prompt that begins the same goes on there,
or on a copy.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import QueueFullError, lines
from .session_shapes import cached_start
from .slot_shapes import SlotShapes

_WORTH_A_COPY = 32
"""Tokens from which on copying a slot takes less than computing them again."""


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request gets a slot, of whose contents the first `cached` tokens are its prompt's."""

    request: int
    slot: int
    cached: int


@dataclass(frozen=True)
class Copy:
    """A slot's contents go to another slot of the same data shard.

    With `request` that goes there with them, and its old slot is free.
    """

    source: int
    target: int
    request: int | None = None


@dataclass(frozen=True)
class Round:
    """What to do next, in this order.

    Attributes:
        moves: copies and admissions, one after the other.
        decode: run a decode step.
        prefill: requests of whose prompts the next chunk is run, at most one a data shard.
    """

    moves: tuple[Copy | Admitted, ...]
    decode: bool
    prefill: tuple[int, ...]


class SlotsView(Protocol):
    """What a scheduler sees of a session.

    Attributes:
        shapes: of its programs.
        contents: for each slot the tokens in its cache.
    """

    @property
    def shapes(self) -> SlotShapes: ...

    @property
    def contents(self) -> Sequence[Sequence[int]]: ...


@dataclass
class _Request:
    name: int
    ids: Sequence[int]
    order: tuple[int, int]
    computed: bool
    slot: int | None = None
    decoding: bool = False


@dataclass
class Scheduler:
    """Slots and a queue.

    Args:
        view: the session's shapes, and what its slots hold now.
        at_once: most requests that run at a time, if fewer than there are slots.
        prefix_caching: prompts may go on from what slots hold.
        copying: slots may be copied.
        max_queued_requests, max_queued_tokens: most that may wait, if there is a limit.
    """

    view: SlotsView
    at_once: int | None = None
    prefix_caching: bool = True
    copying: bool = True
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    _queue: list[tuple[tuple[int, int], _Request]] = field(default_factory=list)
    _known: dict[int, _Request] = field(default_factory=dict)
    _in_slot: dict[int, _Request] = field(default_factory=dict)
    _used: dict[int, int] = field(default_factory=dict)
    _clock: itertools.count[int] = field(default_factory=itertools.count)

    # -- what happens

    def add(
        self, request: int, ids: Sequence[int], priority: int = 0, *, computed: bool = False
    ) -> None:
        """Queue a request.

        Args:
            request: its name; none that is known already.
            ids: its prompt.
            priority: smaller ones go first.
            computed: its whole prompt is, whatever slots hold.

        Raises:
            QueueFullError: too many wait.
        """
        assert request not in self._known
        self._check_room(len(ids))
        made = _Request(request, ids, (priority, next(self._clock)), computed)
        self._known[request] = made
        heapq.heappush(self._queue, (made.order, made))

    def _check_room(self, tokens: int) -> None:
        waiting, most = self.waiting, self.max_queued_requests
        if most is not None and waiting >= most + self.free:
            raise QueueFullError(lines(f"{waiting} requests wait, the most there may", "try later"))
        queued = sum(len(each.ids) for _, each in self._queue)
        limit = self.max_queued_tokens
        if limit is not None and waiting and queued + tokens > limit:
            raise QueueFullError(
                lines(f"{queued} tokens wait, {limit} are the most there may", "try later")
            )

    def end(self, request: int) -> int | None:
        """A request is over, wherever it is; the slot that it had."""
        ended = self._known.pop(request, None)
        if ended is None:
            return None
        if ended.slot is None:
            self._queue = [entry for entry in self._queue if entry[1] is not ended]
            heapq.heapify(self._queue)
            return None
        del self._in_slot[ended.slot]
        self._used[ended.slot] = next(self._clock)
        return ended.slot

    def began(self, request: int) -> None:
        """A request has its first token: from now on it decodes."""
        self._known[request].decoding = True

    # -- what there is

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._in_slot)

    @property
    def free(self) -> int:
        """Slots that requests can have now."""
        slots = self.view.shapes.slots
        return min(slots, self.at_once or slots) - self.running

    @property
    def usage(self) -> float:
        """Part of all positions that requests with a slot hold."""
        held = sum(len(self.view.contents[slot]) for slot in self._in_slot)
        return held / (self.view.shapes.slots * self.view.shapes.length)

    def slot_of(self, request: int) -> int | None:
        """The slot of a request, if it has one."""
        known = self._known.get(request)
        return None if known is None else known.slot

    # -- what to do

    def next_round(self) -> Round | None:
        """What to do next; None when there is nothing."""
        moves: list[Copy | Admitted] = []
        taken: set[int] = set()  # contents that these moves have changed already
        later = []
        while self._queue and self.free:
            entry = heapq.heappop(self._queue)
            if not entry[1].computed and self._is_being_computed(entry[1].ids):
                later.append(entry)
            else:
                moves += self._admit(entry[1], taken)
        for entry in later:
            heapq.heappush(self._queue, entry)
        if not self._queue and self.copying and not moves:
            moves += self._together()
        prefill: dict[int, _Request] = {}
        for each in sorted(self._in_slot.values(), key=lambda each: each.order):
            if not each.decoding:
                prefill.setdefault(self._shard(each.slot), each)
        decode = any(each.decoding for each in self._in_slot.values())
        if not moves and not prefill and not decode:
            return None
        return Round(tuple(moves), decode, tuple(each.name for each in prefill.values()))

    def _shard(self, slot: int | None) -> int:
        assert slot is not None
        return slot // self.view.shapes.per_shard

    def _slots(self, shard: int) -> range:
        return range(shard * self.view.shapes.per_shard, (shard + 1) * self.view.shapes.per_shard)

    def _admit(self, request: _Request, taken: set[int]) -> list[Copy | Admitted]:
        """Give a request a slot, among the first ones of its shard."""
        shards = range(self.view.shapes.shards)
        open_shards = [shard for shard in shards if self._free(shard)]
        wanted = () if request.computed else request.ids
        matches = {shard: self._match(wanted, shard, taken) for shard in open_shards}
        busy = {shard: self.view.shapes.per_shard - len(self._free(shard)) for shard in open_shards}
        # A few tokens in common, as the first one of every text, are no reason for a shard.
        worth = {each: same for each, (_, same) in matches.items() if same >= _WORTH_A_COPY}
        shard = min(open_shards, key=lambda each: (-worth.get(each, 0), busy[each]))
        source, cached = matches[shard]
        needed = self.view.shapes.row_count(busy[shard] + 1)
        first = self._slots(shard)[0]
        near = [slot for slot in self._free(shard) if slot < first + needed]
        moves: list[Copy | Admitted] = []
        if source in near and 2 * cached >= len(self.view.contents[source]):
            target = source
        else:
            target = min(near, key=lambda slot: self._used.get(slot, -1))
            if target == source:  # it holds much more than this prompt needs
                others = [slot for slot in near if slot != source]
                target = min(others, key=lambda slot: self._used.get(slot, -1), default=source)
            moves += self._parked(shard, target, source, taken)
            if source != target and (cached < _WORTH_A_COPY or not self.copying):
                source, cached = None, 0
            if source is not None and source != target:
                moves.append(Copy(source, target))
        taken.add(target)
        self._in_slot[target] = request
        request.slot = target
        return [*moves, Admitted(request=request.name, slot=target, cached=cached)]

    def _is_being_computed(self, ids: Sequence[int]) -> bool:
        """Whether another prompt is prefilled that a copy is soon worth waiting for."""
        if not (self.prefix_caching and self.copying):
            return False
        prefilled = [
            each
            for slot, each in self._in_slot.items()
            if not each.decoding and self._free(self._shard(slot))
        ]
        if not prefilled:
            return False
        held = max(cached_start(contents, ids) for contents in self.view.contents)
        coming = max(cached_start(each.ids, ids) for each in prefilled)
        return coming >= held + _WORTH_A_COPY

    def _free(self, shard: int) -> list[int]:
        return [slot for slot in self._slots(shard) if slot not in self._in_slot]

    def _match(self, ids: Sequence[int], shard: int, taken: set[int]) -> tuple[int | None, int]:
        """The slot that holds most of a prompt's beginning, and how many tokens of it."""
        best: tuple[int | None, int] = (None, 0)
        if not self.prefix_caching:
            return best
        for slot in self._slots(shard):
            if slot in taken or (slot in self._in_slot and not self.copying):
                continue
            same = cached_start(self.view.contents[slot], ids)
            if same > best[1]:
                best = (slot, same)
        return best

    def _parked(
        self, shard: int, target: int, source: int | None, taken: set[int]
    ) -> list[Copy | Admitted]:
        """Keep what a slot holds in one that was used longer ago, or never, but not in `source`."""
        if not (self.prefix_caching and self.copying) or target in taken:
            return []
        if len(self.view.contents[target]) < _WORTH_A_COPY:
            return []
        used = {target, source, *taken}
        others = [slot for slot in self._free(shard) if slot not in used]
        oldest = min(others, key=lambda slot: self._used.get(slot, -1), default=None)
        if oldest is None or self._used.get(oldest, -1) >= self._used.get(target, -1):
            return []
        self._used[oldest] = self._used.get(target, -1)
        taken.add(oldest)
        return [Copy(target, oldest)]

    def _together(self) -> list[Copy | Admitted]:
        """Move a request to one of the first slots, if a decode step then runs fewer rows."""
        for shard in range(self.view.shapes.shards):
            first = self._slots(shard)[0]
            busy = sorted(slot for slot in self._slots(shard) if slot in self._in_slot)
            if not busy:
                continue
            needed = self.view.shapes.row_count(len(busy))
            if self.view.shapes.row_count(busy[-1] - first + 1) == needed:
                continue
            free = [slot for slot in self._free(shard) if slot < first + needed]
            target = min(free, key=lambda slot: self._used.get(slot, -1))
            moved = self._in_slot.pop(busy[-1])
            self._in_slot[target], moved.slot = moved, target
            self._used[busy[-1]] = next(self._clock)
            return [Copy(busy[-1], target, moved.name)]
        return []
