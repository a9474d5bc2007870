"""Query and KV heads placed on any number of devices, exactly. Pure.

In grouped-query attention `G = H / K` query heads read each KV head. A device must hold whole KV
heads with the query heads that read them, and SPMD wants the same number of heads on every device.
So we think in *slots*: a slot is one KV head and up to `group` query heads of it.

- plain division: every KV head is one slot, and the device count divides the slots;
- padding: slots of zeros are added until it does. They contribute exactly nothing, for the columns
  of the output projection are zero, too;
- repetition: the query heads of a KV head are spread over several slots, each with a copy of it;
- both, where repetition alone doesn't divide.

Each `group` from 1 to `G` gives one such layout; `choose` takes the cheapest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UsageError, lines

EMPTY = -1


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Which head of a model is in which slot.

    Attributes:
        query_heads: `H`, of the checkpoint.
        kv_heads: `K`, of the checkpoint.
        devices: size of the mesh axis that the heads are split over.
        group: query heads of a slot.
        query_sources: for each laid-out query head the checkpoint's head that it holds, or `EMPTY`
            for zeros; `slots * group` long.
        kv_sources: the same for the laid-out KV heads; `slots` long.
    """

    query_heads: int
    kv_heads: int
    devices: int
    group: int
    query_sources: tuple[int, ...]
    kv_sources: tuple[int, ...]

    @property
    def slots(self) -> int:
        return len(self.kv_sources)

    @property
    def kind(self) -> str:
        """`divide`, `pad`, `repeat` or `repeat+pad`."""
        repeated = self.group < self.query_heads // self.kv_heads
        if EMPTY in self.query_sources or EMPTY in self.kv_sources:
            return "repeat+pad" if repeated else "pad"
        return "repeat" if repeated else "divide"

    @property
    def extra_weight_percent(self) -> float:
        """Attention weights (and FLOPs of projections) beyond a perfect division, in %."""
        laid_out = len(self.query_sources) + self.slots
        return 100.0 * (laid_out / (self.query_heads + self.kv_heads) - 1)

    @property
    def extra_score_percent(self) -> float:
        """FLOPs of scores and weighted values beyond a perfect division, in %."""
        return 100.0 * (len(self.query_sources) / self.query_heads - 1)

    @property
    def extra_cache_percent(self) -> float:
        """Bytes of KV cache beyond a perfect division, in %."""
        return 100.0 * (self.slots / self.kv_heads - 1)

    @property
    def reason(self) -> str:
        """One line for people."""
        base = f"{self.query_heads} query / {self.kv_heads} KV heads on {self.devices} devices"
        if self.kind == "divide":
            return f"{base}: divide evenly"
        words = {
            "pad": "padded with zero heads",
            "repeat": "KV heads repeated",
            "repeat+pad": "KV heads repeated and padded",
        }
        return (
            f"{base}: {words[self.kind]} to {len(self.query_sources)} / {self.slots} "
            f"(+{self.extra_weight_percent:.0f}% attention weights, "
            f"+{self.extra_cache_percent:.0f}% cache)"
        )


def check_heads(query_heads: int, kv_heads: int) -> None:
    """Raise `UsageError` unless the KV heads divide the query heads."""
    for name, value in (("query heads", query_heads), ("KV heads", kv_heads)):
        if value < 1:
            raise UsageError(lines(f"{value} {name}", "expected at least 1"))
    if query_heads % kv_heads:
        raise UsageError(
            lines(
                f"{query_heads} query heads do not divide by {kv_heads} KV heads",
                "expected a multiple: every KV head serves as many",
            )
        )


def choose(query_heads: int, kv_heads: int, devices: int) -> HeadLayout:
    """The exact layout with the fewest attention weights; among equals the smallest cache.

    Raises:
        UsageError: the KV heads don't divide the query heads, or a count is below 1.
    """
    check_heads(query_heads, kv_heads)
    if devices < 1:
        raise UsageError(lines(f"{devices} devices", "expected at least 1"))

    def cost(group: int) -> tuple[int, int]:
        slots = padded(kv_heads * math.ceil(query_heads // kv_heads / group), devices)
        return slots * group + slots, slots

    group = min(range(1, query_heads // kv_heads + 1), key=cost)
    return layout_for_group(query_heads, kv_heads, devices, group)


def layout_for_group(query_heads: int, kv_heads: int, devices: int, group: int) -> HeadLayout:
    """The layout with `group` query heads in a slot, padded to a multiple of `devices` slots."""
    heads_per_kv = query_heads // kv_heads
    kv_sources: list[int] = []
    query_sources: list[int] = []
    for kv in range(kv_heads):
        first, last = kv * heads_per_kv, (kv + 1) * heads_per_kv
        for start in range(first, last, group):
            members = list(range(start, min(start + group, last)))
            kv_sources.append(kv)
            query_sources += members + [EMPTY] * (group - len(members))
    padding = -len(kv_sources) % devices
    return HeadLayout(
        query_heads=query_heads,
        kv_heads=kv_heads,
        devices=devices,
        group=group,
        query_sources=tuple(query_sources + [EMPTY] * (padding * group)),
        kv_sources=tuple(kv_sources + [EMPTY] * padding),
    )


def padded(size: int, devices: int) -> int:
    """The next multiple of `devices`: what is split evenly is padded with zeros at its end."""
    return math.ceil(size / devices) * devices
