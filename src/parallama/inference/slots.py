"""A session with slots: requests enter and leave while others decode, on few programs.

The cache has a row for every slot. A decode step runs the first slots only, so a lone request
doesn't pay for the others. What a slot holds stays there until another request needs the slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..engine.interface import DeviceTensor, Steps
from ..engine.row_sampling import RowSampling
from ..sharded.reshard import Mover
from . import state
from .device_state import DeviceState
from .programs import ProgramSet
from .run_stats import Choice
from .slot_shapes import SlotShapes
from .state import SlotChunk


@dataclass
class Slot:
    """What the host knows of a slot.

    Attributes:
        cached: tokens whose keys and values are in the cache, from the first position on.
        token: the last chosen token, which is not cached yet; None unless the slot is live.
        sampling: how its tokens are chosen.
    """

    cached: list[int] = field(default_factory=list)
    token: int | None = None
    sampling: RowSampling = field(default_factory=RowSampling)


class SlotSession(DeviceState):
    """Slots on the devices, and the programs that move them.

    Args:
        steps: the model.
        programs: from `make_programs`; `prepare` compiles into it.
        shapes: of its cache, and of the programs that it may run.

    Attributes:
        slots: all of them, shard after shard.
    """

    def __init__(
        self,
        steps: Steps,
        programs: ProgramSet,
        shapes: SlotShapes,
    ) -> None:
        super().__init__(steps, programs)
        self.shapes = shapes
        self.slots = [Slot() for _ in range(shapes.slots)]
        self._params: dict[str, DeviceTensor] | None = None
        with self.mesh.lock:
            self._state = state.empty_cache(steps, shapes.slots, shapes.length)
            self._state |= state.blank_slots(steps, shapes.slots)

    def prepare(
        self, shapes: SlotShapes, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Compile what isn't yet of the programs of these shapes, of the same cache.

        Args:
            progress: called with programs compiled and their number.
        """
        self.shapes = shapes
        self._compile(shapes.keys(), progress)

    # -- moving to another mesh

    def move(self, steps: Steps, programs: ProgramSet, mover: Mover) -> None:
        """Go on with the same model on another mesh. Compiles nothing yet: see `ready`."""
        kept = len(self.slots)
        self.shapes = self.shapes.on(steps.mesh.shape.data)
        self._take_along(steps, programs, mover, kept=kept, rows=self.shapes.slots)
        self.slots += [Slot() for _ in range(self.shapes.slots - kept)]
        self._params = None

    def ready(self, progress: Callable[[int, int], None] | None) -> None:
        """Compile what this session can need after a `move`."""
        self.prepare(self.shapes, progress)

    # -- running

    @property
    def contents(self) -> list[list[int]]:
        """For each slot the tokens whose keys and values are in the cache."""
        return [slot.cached for slot in self.slots]

    def place(self, slot: int) -> tuple[int, int]:
        """A slot's data shard, and its number there."""
        return divmod(slot, self.shapes.per_shard)

    def admit(self, slot: int, sampling: RowSampling, cached: int) -> None:
        """Give a slot to a request, of whose prompt it holds the first `cached` tokens."""
        held = self.slots[slot]
        del held.cached[cached:]
        held.token, held.sampling, self._params = None, sampling, None

    def evict(self, slot: int) -> None:
        """Take a slot from its request. What it holds stays until it is given to another."""
        self.slots[slot].token, self._params = None, None

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, Choice]:
        """Run the next chunk of each of these slots' prompts, at most one a data shard.

        Returns:
            The first token of each whose prompt has ended with it.
        """
        # A shard that has none of them writes behind what its first slot holds.
        first = [self.slots[shard * self.shapes.per_shard] for shard in range(self.shapes.shards)]
        chunks = [SlotChunk(start=len(held.cached)) for held in first]
        size = self.shapes.chunk(
            max(len(prompt) - len(self.slots[slot].cached) for slot, prompt in prompts.items())
        )
        for slot, prompt in prompts.items():
            shard, number = self.place(slot)
            start = len(self.slots[slot].cached)
            ids = prompt[start : start + size]
            final = start + len(ids) == len(prompt)
            chunks[shard] = SlotChunk(
                number, ids, start, final, len(prompt), prompt if final else ()
            )
        began = time.perf_counter()
        with self._step():
            extra = state.put_slot_chunks(self.steps, chunks, size)
            self._advance(self.shapes.prefill(size), self._sampling() | extra)
            ends = [slot for slot in prompts if chunks[self.place(slot)[0]].final]
            choices = {choice.row: choice for choice in self._read(ends)}
        for slot in prompts:
            self.slots[slot].cached += chunks[self.place(slot)[0]].ids
        for slot, choice in choices.items():
            self.slots[slot].token, self._params = choice.token, None
        self.stats.prefill_tokens += sum(len(chunk.ids) for chunk in chunks)
        self.stats.prefill_s += time.perf_counter() - began
        return choices

    def decode(self) -> dict[int, Choice]:
        """One more token for every live slot."""
        began = time.perf_counter()
        live = [slot for slot, held in enumerate(self.slots) if held.token is not None]
        rows = self.shapes.row_count(max(self.place(slot)[1] for slot in live) + 1)
        with self._step():
            given = self._sampling()
            launched, run_s = self._advance(self.shapes.decode(rows), given)
            choices = {choice.row: choice for choice in self._read(live)}
        read = time.perf_counter()
        for slot, choice in choices.items():
            held = self.slots[slot]
            assert held.token is not None
            held.cached.append(held.token)
            held.token = choice.token
        ended = time.perf_counter()
        self.stats.decode_steps += 1
        self.stats.decode_s += ended - began
        self.stats.decode_host_s += (launched - began) - run_s + (ended - read)
        return choices

    def copy(self, source: int, target: int) -> None:
        """Copy what a slot holds to another of its data shard, the last token included."""
        shard, number = self.place(source)
        shards = self.mesh.shape.data
        places = {name: torch.zeros(shards, dtype=torch.int32) for name in ("source", "target")}
        places["source"][shard], places["target"][shard] = number, self.place(target)[1]
        with self._step():
            self._advance(self.shapes.copy(), state.put(self.steps, places))
        held = self.slots[source]
        self.slots[target] = replace(held, cached=list(held.cached))
        self._params = None

    def _sampling(self) -> dict[str, DeviceTensor]:
        """Sampling parameters of every slot, and which are live; put anew after a change."""
        if self._params is None:
            host = state.host_params([slot.sampling for slot in self.slots])
            host["live"] = torch.tensor([slot.token is not None for slot in self.slots])
            self._params = state.put(self.steps, host)
        return self._params
