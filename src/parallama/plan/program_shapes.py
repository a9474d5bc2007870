"""The shapes that programs come in: chunks of a prompt, and cache lengths. Pure."""

from __future__ import annotations

import math

CHUNK = 512
"""A longer prompt is prefilled in chunks of so many positions: one program for any length."""
_SMALLEST_CHUNK = 16
_CACHE_STEP, _FINE_STEP = 256, 32
_MANY_ROWS = 8
"""From so many rows on, reading the cache takes a good part of a decode step: what is never written is not worth reading, and more lengths mean more programs."""


def chunk_size(longest: int) -> int:
    """`S` of the prefill program for rows with up to `longest` new tokens: a power of two, at most `CHUNK`."""
    return min(CHUNK, max(_SMALLEST_CHUNK, 1 << (longest - 1).bit_length()))


def text_size(longest: int, limit: int) -> int:
    """Positions of the program that runs texts of up to `longest` tokens at once: a power of two, but beyond `CHUNK` no more than `limit` takes in whole chunks."""
    if longest <= CHUNK:
        return chunk_size(longest)
    return min(1 << (longest - 1).bit_length(), math.ceil(limit / CHUNK) * CHUNK)


def cache_buckets(capacity: int, smallest: int = _CACHE_STEP, *, rows: int = 1) -> list[int]:
    """Cache lengths for a run of `rows` that needs up to `capacity` positions: doubling from `smallest`, and an exact last one (in steps of 256, or 32 for 8 rows and more).

    A bucket that the last one is at most double of is left out: growing would cost more than it saves.
    """
    step = _CACHE_STEP if rows < _MANY_ROWS else _FINE_STEP
    last = math.ceil(capacity / step) * step
    doubling = []
    size = smallest
    while 2 * size < last:
        doubling.append(size)
        size *= 2
    return [*doubling, last]


def prompt_buckets(capacity: int, longest_prompt: int, *, rows: int = 1) -> list[int]:
    """Cache lengths for `rows` of up to `capacity` positions whose first prefill brings up to `longest_prompt`, filled up to whole chunks."""
    size = chunk_size(longest_prompt)
    padded = math.ceil(longest_prompt / size) * size
    return [
        bucket for bucket in cache_buckets(max(capacity, padded), rows=rows) if bucket >= padded
    ]
