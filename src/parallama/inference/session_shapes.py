"""The programs that a session needs, by their shapes; all are known before it runs. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.steps import StepKey
from ..plan.program_shapes import CHUNK, cache_buckets, chunk_size, prompt_buckets

_CONTINUED_CHUNKS = (64, CHUNK)


@dataclass(frozen=True, kw_only=True)
class SessionShapes:
    """Of one session.

    Attributes:
        batch: rows over all devices.
        buckets: lengths of the cache, shortest first.
        chunks: sizes of a prompt's chunks.
        continued: prompts may be continued from what is cached.
        scored: decode steps give logits.
        fresh: prefills find an empty cache.
    """

    batch: int
    buckets: tuple[int, ...]
    chunks: tuple[int, ...]
    continued: bool
    scored: bool
    fresh: bool

    @classmethod
    def of(
        cls,
        *,
        batch: int,
        capacity: int,
        longest_prompt: int,
        continued: bool,
        scored: bool,
    ) -> SessionShapes:
        """The shapes for a session; arguments as for `Session`."""
        if continued:
            needed = capacity + min(_CONTINUED_CHUNKS)
            buckets = cache_buckets(needed, smallest=2048, rows=batch)
            chunks = tuple(size for size in _CONTINUED_CHUNKS if size <= buckets[-1])
        else:
            chunks = (chunk_size(longest_prompt),)
            buckets = prompt_buckets(capacity, longest_prompt, rows=batch)
        return cls(
            batch=batch,
            buckets=tuple(buckets),
            chunks=chunks,
            continued=continued,
            scored=scored,
            fresh=not continued and longest_prompt <= CHUNK,
        )

    def keys(self) -> list[StepKey]:
        """Every program that this session can ever need."""
        starts = self.buckets if self.continued else self.buckets[:1]
        keys = [
            self.prefill(length, size)
            for length in starts
            for size in self.chunks
            if size <= length
        ]
        keys += [self.decode(length) for length in self.buckets]
        following = zip(self.buckets, self.buckets[1:], strict=False)
        return keys + [self.grow(short, long) for short, long in following]

    def prefill(self, length: int, size: int) -> StepKey:
        return StepKey(
            kind="prefill",
            batch=self.batch,
            length=length,
            new=size,
            fresh=self.fresh,
        )

    def decode(self, length: int) -> StepKey:
        return StepKey(kind="decode", batch=self.batch, length=length, scored=self.scored)

    def grow(self, short: int, long: int) -> StepKey:
        return StepKey(kind="grow", batch=self.batch, length=short, new=long)

    def chunking(self, starts: Sequence[int], ends: Sequence[int]) -> tuple[int, int, int]:
        """How to prefill rows from `starts` to `ends`.

        It takes the smallest chunk size that takes every row at once, else the largest that fits.

        Returns:
            Chunk size, number of chunks, and positions that the cache must have.
        """

        def plan(size: int) -> tuple[int, int, int]:
            counts = [
                math.ceil((end - start) / size) for start, end in zip(starts, ends, strict=True)
            ]
            chunks = max(counts)
            # A row that is through earlier than others has further chunks written behind its end.
            reach = [
                start + count * size if count == chunks else end + size
                for start, count, end in zip(starts, counts, ends, strict=True)
            ]
            return size, chunks, max(reach)

        plans = [plan(size) for size in self.chunks]
        fitting = [made for made in plans if made[2] <= self.buckets[-1]] or plans[:1]
        return min(fitting, key=lambda made: (made[1], made[0]))


def cached_start(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """From which token on a prompt must be computed; at least its last is."""
    same, most = 0, min(len(cached), len(prompt) - 1)
    while same < most:  # slices are compared far faster than tokens one by one
        middle = (same + most + 1) // 2
        if list(cached[same:middle]) == list(prompt[same:middle]):
            same = middle
        else:
            most = middle - 1
    return same
