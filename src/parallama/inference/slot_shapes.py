"""The programs that a session with slots needs: few, and all known before it runs. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from ..engine.steps import StepKey
from ..plan.program_shapes import SLOT_CHUNKS, slot_chunk, slot_length


@dataclass(frozen=True, kw_only=True)
class SlotShapes:
    """Of one session.

    Attributes:
        slots: rows of the cache, a multiple of `shards`.
        length: positions of the cache.
        shards: size of the mesh's data axis.
        sizes: chunks of a prompt that there can be, smallest first.
        rows: numbers of a shard's slots that a decode step can run now, smallest first.
        chunks: those of `sizes` that can be run now.
        copies: slots can be copied now.
        scored: prompts can be scored now.
    """

    slots: int
    length: int
    shards: int
    sizes: tuple[int, ...] = SLOT_CHUNKS
    rows: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    copies: bool = False
    scored: bool = False

    @classmethod
    def of(
        cls, *, slots: int, positions: int, shards: int, sizes: tuple[int, ...] = SLOT_CHUNKS
    ) -> SlotShapes:
        """Shapes of which no program is there yet.

        Args:
            slots: requests at a time.
            positions: most tokens of a request, its prompt and its answer.
            shards: size of the mesh's data axis.
            sizes: of a prompt's chunks.
        """
        per_shard = math.ceil(slots / shards)
        return cls(
            slots=per_shard * shards,
            length=slot_length(positions, max(sizes)),
            shards=shards,
            sizes=sizes,
        )

    @property
    def per_shard(self) -> int:
        """Slots of one data shard."""
        return self.slots // self.shards

    def on(self, shards: int) -> SlotShapes:
        """The same for a mesh with another data axis, where requests may be in any slot."""
        if shards == self.shards:
            return self
        per_shard = math.ceil(self.slots / shards)
        return replace(self, slots=per_shard * shards, shards=shards, rows=(per_shard,))

    def row_counts(self, at_once: int | None = None) -> tuple[int, ...]:
        """Numbers of a shard's slots that are worth a program: 1, 2, 4 ... and all.

        Args:
            at_once: only the one that is needed for so many requests at a time.
        """
        doubling = [1 << power for power in range((self.per_shard - 1).bit_length())]
        counts = [*doubling, self.per_shard]
        if at_once is None:
            return tuple(counts)
        needed = math.ceil(min(at_once, self.slots) / self.shards)
        return (next(rows for rows in counts if rows >= needed),)

    def covering(
        self, at_once: int, prompts: Collection[int], *, copies: bool, scored: bool
    ) -> SlotShapes:
        """With the programs for some requests besides.

        Args:
            at_once: how many run at a time.
            prompts: their lengths.
            copies: slots are copied.
            scored: prompts are scored.
        """
        chunks = {slot_chunk(length, self.sizes) for length in (min(prompts), max(prompts))}
        return replace(
            self,
            rows=tuple(sorted({*self.rows, *self.row_counts(at_once)})),
            chunks=tuple(sorted({*self.chunks, *chunks})),
            copies=self.copies or copies,
            scored=self.scored or scored,
        )

    def complete(self, *, scored: bool = True) -> SlotShapes:
        """With every program that there can be; with `scored` those of scored prompts, too."""
        return replace(
            self,
            rows=self.row_counts(),
            chunks=self.sizes,
            copies=self.per_shard > 1,
            scored=scored,
        )

    def chunk(self, left: int) -> int:
        """Size of the next chunk of a prompt of which `left` tokens are left."""
        return slot_chunk(left, self.chunks)

    def row_count(self, needed: int) -> int:
        """The smallest number of a shard's first slots that takes in `needed` of them."""
        return next((rows for rows in self.rows if rows >= needed), self.per_shard)

    # -- programs

    def keys(self) -> list[StepKey]:
        """Of all that can be run now."""
        keys = [self.prefill(size) for size in self.chunks]
        keys += [self.decode(rows) for rows in self.rows]
        keys += [self.prefill(self.sizes[-1], scored=True)] if self.scored else []
        return [*keys, *([self.copy()] if self.copies else [])]

    def prefill(self, size: int, *, scored: bool = False) -> StepKey:
        """Scored prompts have one size of chunks, the largest."""
        return StepKey(
            kind="slot_prefill", batch=self.slots, length=self.length, new=size, scored=scored
        )

    def decode(self, rows: int) -> StepKey:
        """Of `rows` slots of each shard."""
        return StepKey(
            kind="slot_decode",
            batch=self.slots,
            length=self.length,
            rows=rows * self.shards,
        )

    def copy(self) -> StepKey:
        return StepKey(kind="slot_copy", batch=self.slots, length=self.length)
