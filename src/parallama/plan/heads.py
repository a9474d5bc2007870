"""Query and KV heads laid over any number of devices, exactly.

Grouped-query attention gives each KV head `G = H / K` query heads. A device must hold whole KV heads with the query heads that read
them, and SPMD wants the same number on every device. So we think in *slots*: a slot is one KV head and up to `group` query heads of it.

- plain division: every KV head is one slot and the device count divides them;
- padding: slots of zeros are added until it does (a zero output-projection column makes them contribute exactly nothing);
- repetition: a KV head's query heads are spread over several slots, and the KV head stands in each of them;
- both, when repetition alone doesn't divide.

Every choice of `group` from 1 to `G` is one such layout; `choose` takes the cheapest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UsageError, lines

EMPTY = -1


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Where every head of a model lies.

    Attributes:
        query_heads: `H`, of the checkpoint.
        kv_heads: `K`, of the checkpoint.
        devices: size of the mesh axis that the heads are split over.
        group: query heads a slot.
        query_sources: for each laid-out query head the checkpoint's head it holds, or `EMPTY` for zeros; `slots * group` long.
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
        padded = EMPTY in self.query_sources or EMPTY in self.kv_sources
        return {
            (False, False): "divide",
            (False, True): "pad",
            (True, False): "repeat",
            (True, True): "repeat+pad",
        }[repeated, padded]

    @property
    def extra_weight_percent(self) -> float:
        """Attention weight bytes (and projection FLOPs) a device, over a perfect division, in %."""
        return 100.0 * (
            (len(self.query_sources) + self.slots) / (self.query_heads + self.kv_heads) - 1
        )

    @property
    def extra_score_percent(self) -> float:
        """FLOPs of scores and weighted values a device, over a perfect division, in %."""
        return 100.0 * (len(self.query_sources) / self.query_heads - 1)

    @property
    def extra_cache_percent(self) -> float:
        """KV-cache bytes a device, over a perfect division, in %."""
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
            f"(+{self.extra_weight_percent:.0f}% attention weights, +{self.extra_cache_percent:.0f}% cache)"
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


def layout_for_group(query_heads: int, kv_heads: int, devices: int, group: int) -> HeadLayout:
    """The layout with `group` query heads a slot, padded to a multiple of `devices` slots."""
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


def choose(query_heads: int, kv_heads: int, devices: int) -> HeadLayout:
    """The exact layout with the fewest attention weights; among equals the smallest cache.

    Raises:
        UsageError: the KV heads don't divide the query heads, or a count is below 1.
    """
    check_heads(query_heads, kv_heads)
    if devices < 1:
        raise UsageError(lines(f"{devices} devices", "expected at least 1"))
    candidates = (
        layout_for_group(query_heads, kv_heads, devices, group)
        for group in range(1, query_heads // kv_heads + 1)
    )
    return min(
        candidates, key=lambda layout: (len(layout.query_sources) + layout.slots, layout.slots)
    )


def padded(size: int, devices: int) -> int:
    """The next multiple of `devices`: intermediate and vocabulary sizes are padded with zeros at the end."""
    return math.ceil(size / devices) * devices
