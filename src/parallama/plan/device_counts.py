"""Which device counts along "model" suit a model: head layout, padding, and extra bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..model.spec import ModelSpec
from . import heads
from .layer_patterns import local_elements
from .make_plan import make_plan
from .mesh_shape import MODEL, MeshShape

MOST_DEVICES = 64
"""Larger device counts are not suggested."""


@dataclass(frozen=True, kw_only=True)
class DeviceCount:
    """How a model is split over so many devices along "model".

    Attributes:
        kind: of the head layout: divide, pad, repeat, repeat+pad.
        query_heads, kv_heads, intermediate, vocab: after layout and padding.
        extra_weight_percent: weights beyond the model's own, over all devices, in %. Replicated
            norms are not counted.
        extra_cache_percent: the same of the KV cache.
        param_bytes_per_device: weights of each device.
        fits: whether the run fits there, with as many devices along "data" as it has; null
            without a hardware.
    """

    devices: int
    kind: str
    query_heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    extra_weight_percent: float
    extra_cache_percent: float
    param_bytes_per_device: int
    fits: bool | None = None


def device_counts(
    model: ModelSpec,
    counts: Sequence[int],
    itemsize: int,
    fits: Mapping[int, bool] | None = None,
) -> tuple[DeviceCount, ...]:
    """How the model's own plan splits it over each of these device counts."""
    own, _ = _parameter_elements(model, 1)
    rows = []
    for devices in counts:
        everywhere, local = _parameter_elements(model, devices)
        layout = heads.choose(model.query_heads, model.kv_heads, devices)
        row = DeviceCount(
            devices=devices,
            kind=layout.kind,
            query_heads=len(layout.query_sources),
            kv_heads=layout.slots,
            intermediate=heads.padded(model.intermediate, devices),
            vocab=heads.padded(model.vocab, devices),
            extra_weight_percent=100.0 * (everywhere / own - 1),
            extra_cache_percent=layout.extra_cache_percent,
            param_bytes_per_device=local * itemsize,
            fits=None if fits is None else fits[devices],
        )
        rows.append(row)
    return tuple(rows)


def suggested(model: ModelSpec, mesh: MeshShape) -> list[int]:
    """Counts worth a line: powers of two, divisors of `K` and of `2 K`, and the mesh's own."""
    counts = range(1, MOST_DEVICES + 1)
    powers = {count for count in counts if count.bit_count() == 1}
    divisors = {count for count in counts if 2 * model.kv_heads % count == 0}
    return sorted(powers | divisors | {mesh.model})


def _parameter_elements(model: ModelSpec, devices: int) -> tuple[int, int]:
    """Elements of all parameters after layout and padding, and of those on one device.

    Layers are alike: one is planned.
    """
    plan = make_plan(replace(model, layers=1), MeshShape({MODEL: devices}))
    everywhere = local = 0
    for placement in plan.parameters:
        times = model.layers if ".layers." in placement.name else 1
        everywhere += times * math.prod(int(size) for size in placement.shape)
        local += times * local_elements(plan, placement)
    return everywhere, local
