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
from ..engine.steps import STATE_AXES
from ..sharded.reshard import Mover
from . import state, told
from .choosing import Choosing
from .device_state import DeviceState
from .programs import ProgramSet
from .run_stats import Choice, TokenLogprob
from .slot_biases import BiasRows, Row, row_of
from .slot_shapes import SlotShapes
from .state import SlotChunk


@dataclass
class Slot:
    """What the host knows of a slot.

    Attributes:
        cached: tokens whose keys and values are in the cache, from the first position on.
        token: the last chosen token, which is not cached yet; None unless the slot is live.
        choosing: how its tokens are chosen.
        prompt: tokens of its prompt, once that has ended.
        scores: of the prompt's tokens so far, if they are asked for.
    """

    cached: list[int] = field(default_factory=list)
    token: int | None = None
    choosing: Choosing = field(default_factory=Choosing)
    prompt: int = 0
    scores: list[TokenLogprob | None] = field(default_factory=lambda: [None])


class SlotSession(DeviceState):
    """Slots on the devices, and the programs that move them.

    Args:
        steps: the model.
        programs: from `make_programs`; `prepare` compiles into it.
        shapes: of its cache, and of the programs that it may run.

    Attributes:
        slots: all of them, shard after shard.
        biases, prompt_biases: of all slots, and of the prompts that run at a time.
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
        with self.mesh.lock:
            self._state = state.empty_cache(steps, shapes.slots, shapes.length)
            self._state |= state.blank_slots(steps, shapes.slots)
            self._blank()

    def _blank(self) -> None:
        """Arguments of steps that are kept from one to the next, for all slots or shards."""
        self._params: dict[str, DeviceTensor] | None = None
        self.biases = BiasRows(self.steps, self.shapes.slots)
        self.prompt_biases = BiasRows(self.steps, self.shapes.shards)

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
        self._blank()

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

    def admit(self, slot: int, choosing: Choosing, cached: int) -> None:
        """Give a slot to a request, of whose prompt it holds the first `cached` tokens."""
        held = self.slots[slot].cached
        del held[cached:]
        self.slots[slot], self._params = Slot(held, choosing=choosing), None

    def evict(self, slot: int) -> None:
        """Take a slot from its request. What it holds stays until it is given to another."""
        self.slots[slot].token, self._params = None, None

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> dict[int, Choice]:
        """Run the next chunk of each of these slots' prompts, at most one a data shard.

        Returns:
            The first token of each whose prompt has ended with it.
        """
        began = time.perf_counter()
        scored = any(self.slots[slot].choosing.scored is not None for slot in prompts)
        left = max(len(prompt) - len(self.slots[slot].cached) for slot, prompt in prompts.items())
        size = self.shapes.sizes[-1] if scored else self.shapes.chunk(left)
        chunks = self._chunks(prompts, size)
        ends = [slot for slot in prompts if chunks[self.place(slot)[0]].final]
        biases = {
            self.place(slot)[0]: row_of(bias, prompts[slot], 0)
            for slot in ends
            if (bias := self.slots[slot].choosing.bias) is not None
        }
        with self._step():
            given = state.put_slot_chunks(self.steps, chunks, size, scored=scored)
            given["bias"] = self.prompt_biases.holding(biases)
            self._advance(self.shapes.prefill(size, scored=scored), self._sampling() | given)
            rows = {slot: self.place(slot)[0] for slot in ends}
            choices = self._with_tops(self._read(ends), rows)
            if scored:
                choices |= self._with_scores(choices, prompts, chunks)
        for slot, prompt in prompts.items():
            self.slots[slot].cached += chunks[self.place(slot)[0]].ids
            self.slots[slot].prompt = len(prompt)
        for slot, choice in choices.items():
            self.slots[slot].token, self._params = choice.token, None
        self.stats.prefill_tokens += sum(len(chunk.ids) for chunk in chunks)
        self.stats.prefill_s += time.perf_counter() - began
        return choices

    def _chunks(self, prompts: Mapping[int, Sequence[int]], size: int) -> list[SlotChunk]:
        """What each data shard is to run of its prompt."""
        # A shard that has none of them writes behind what its first slot holds.
        first = [self.slots[shard * self.shapes.per_shard] for shard in range(self.shapes.shards)]
        chunks = [SlotChunk(start=len(held.cached)) for held in first]
        for slot, prompt in prompts.items():
            shard, number = self.place(slot)
            start = len(self.slots[slot].cached)
            ids = prompt[start : start + size]
            final = start + len(ids) == len(prompt)
            targets = prompt[start + 1 : start + 1 + len(ids)]
            chunks[shard] = SlotChunk(
                number, ids, start, final, len(prompt), prompt if final else (), targets
            )
        return chunks

    def decode(self) -> dict[int, Choice]:
        """One more token for every live slot."""
        began = time.perf_counter()
        live = [slot for slot, held in enumerate(self.slots) if held.token is not None]
        rows = self.shapes.row_count(max(self.place(slot)[1] for slot in live) + 1)
        places = {slot: self.place(slot)[0] * rows + self.place(slot)[1] for slot in live}
        with self._step():
            given = self._sampling() | {"bias": self.biases.holding(self._bias_rows(live))}
            launched, run_s = self._advance(self.shapes.decode(rows), given)
            choices = self._with_tops(self._read(live), places)
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
            live = [slot.token is not None for slot in self.slots]
            host = state.slot_params([slot.choosing for slot in self.slots], live)
            host["live"] = torch.tensor(live)
            self._params = state.put(self.steps, host)
        return self._params

    def _bias_rows(self, live: Sequence[int]) -> dict[int, Row]:
        """The rows of `bias` that these slots need now."""
        rows = {}
        for slot in live:
            held = self.slots[slot]
            if (bias := held.choosing.bias) is not None and held.token is not None:
                tail = [*held.cached[-bias.reach or len(held.cached) :], held.token]
                rows[slot] = row_of(bias, tail, len(held.cached) + 1 - held.prompt)
        return rows

    # -- what a step tells besides

    def _tell(self, *names: str) -> list[torch.Tensor]:
        return [self.mesh.fetch(self._told[name], STATE_AXES[name]) for name in names]

    def _with_tops(self, choices: Sequence[Choice], rows: Mapping[int, int]) -> dict[int, Choice]:
        """The choices by slot, with the likeliest tokens where they are asked for.

        Args:
            rows: of the step, by slot.
        """
        found = {choice.row: choice for choice in choices}
        asked = {slot: self.slots[slot].choosing.tops for slot in found}
        if any(asked.values()):
            ids, logprobs = self._tell("top_ids", "top_logprobs")
            for slot, count in asked.items():
                row = rows[slot]
                top = told.top_of(ids[row], logprobs[row], count)
                found[slot] = replace(found[slot], top=top)
        return found

    def _with_scores(
        self,
        choices: Mapping[int, Choice],
        prompts: Mapping[int, Sequence[int]],
        chunks: Sequence[SlotChunk],
    ) -> dict[int, Choice]:
        """The choices of prompts that are scored and have ended, with the scores."""
        names = ("logprobs", "prompt_top_ids", "prompt_top_logprobs")
        given = dict(zip(names, self._tell(*names), strict=True))
        found = {}
        for slot in prompts:
            shard, held = self.place(slot)[0], self.slots[slot]
            if (count := held.choosing.scored) is None:
                continue
            held.scores += told.scores(chunks[shard].targets, shard, given, count)
            if slot in choices:
                found[slot] = replace(choices[slot], prompt=tuple(held.scores))
        return found
