"""The shapes that programs are compiled for: chunks of a prompt, cache lengths, slots. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

CHUNK = 512
"""A longer prompt is prefilled in chunks of so many positions: one program for any length."""
_SMALLEST_CHUNK = 16
_CACHE_STEP, _FINE_STEP = 256, 32
_MANY_ROWS = 8
"""From so many rows on, the cache's last length is exact to `_FINE_STEP` positions.

Reading the cache then takes a good part of a decode step, and what is never written is not worth
reading. With fewer rows that would only mean more programs.
"""
SLOT_CHUNKS = (32, 128)
"""Positions of a prompt that are written into a slot at a time, in few programs.

A long prompt holds the others up for one chunk at a time. 128 keep XLA:CPU's products busy.
"""
BLOCK = 256
"""Positions of a slot's cache that attention reads at a time."""
MOST_TOP = 20
"""Likeliest tokens of a place that a step on slots can tell of."""
MAX_NUM_SEQS = 16
"""Requests that run at a time, unless something else is asked for."""
_SLOT_STEP, _SHORTEST = 256, 512


def chunk_size(longest: int) -> int:
    """`S` of the prefill program: a power of two, at most `CHUNK`.

    Args:
        longest: the most new tokens of a row.
    """
    return min(CHUNK, max(_SMALLEST_CHUNK, _power_of_two(longest)))


def text_size(longest: int, limit: int) -> int:
    """Positions of the program that runs whole texts of up to `longest` tokens: a power of two.

    Args:
        limit: the longest text there can be. Beyond `CHUNK` a program has no more positions than
            this takes in whole chunks.
    """
    if longest <= CHUNK:
        return chunk_size(longest)
    return min(_power_of_two(longest), math.ceil(limit / CHUNK) * CHUNK)


def cache_buckets(capacity: int, smallest: int = _CACHE_STEP, *, rows: int = 1) -> list[int]:
    """Cache lengths of a run that needs up to `capacity` positions.

    They double from `smallest`; the last one is `capacity` in steps of 256, or of 32 for 8 rows
    and more. A length is left out if the last one is at most its double: to grow then would cost
    more than it saves.
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
    """Cache lengths of a run whose first prefill fills whole chunks.

    Args:
        capacity: positions that the run needs at most.
        longest_prompt: tokens.
    """
    size = chunk_size(longest_prompt)
    prefilled = math.ceil(longest_prompt / size) * size
    buckets = cache_buckets(max(capacity, prefilled), rows=rows)
    return [bucket for bucket in buckets if bucket >= prefilled]


# -- slots


def slot_length(positions: int, chunk: int = SLOT_CHUNKS[-1]) -> int:
    """Positions that a slot's cache gets for requests of up to so many.

    Args:
        chunk: the largest one. It may have fewer tokens than its program: the rest is written
            behind them.
    """
    return math.ceil((positions + chunk) / _SLOT_STEP) * _SLOT_STEP


def run_slots(requests: int, most: int = MAX_NUM_SEQS) -> int:
    """Slots that a run gets for so many requests at a time: a power of two, so that runs share.

    Args:
        most: that other runs will have; it takes more to exceed it.
    """
    return min(_power_of_two(requests), max(requests, most))


def slot_chunk(tokens: int, sizes: Sequence[int] = SLOT_CHUNKS) -> int:
    """Size of a chunk for so many tokens: the smallest that takes them all, else the largest.

    Args:
        sizes: that there are, smallest first.
    """
    return next((size for size in sizes if size >= tokens), sizes[-1])


def shortest_length(positions: int, limit: int) -> int:
    """Positions that a run's slots are made for, if its requests have so many: one of few.

    Args:
        limit: more than these no request has.
    """
    chunk = SLOT_CHUNKS[-1]
    doubled = max(_SHORTEST, _power_of_two(positions + chunk)) - chunk
    return min(doubled, max(limit, positions))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
