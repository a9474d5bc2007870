"""The static KV cache: one buffer of keys and one of values a layer, split over rows and heads, written in place.

Shapes: keys and values are `[B, K, T, D]`: a position is one stretch of `D` numbers a head, so writing it touches few pages (see also `products`).

A step that both updates a donated buffer and multiplies with it makes XLA copy the buffer, because nothing tells it that the product
comes first. So attention reads the buffers as they came in, handles the new positions apart, and the write is made to depend on
attention's result: with that order fixed the update happens in place, for any number of heads and rows a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...plan.mesh_shape import DATA
from ..steps import CACHE_AXES, cache_names
from .mesh import DeviceMesh
from .ops import row_update


def allocate(
    mesh: DeviceMesh,
    layers: int,
    batch: int,
    slots: int,
    head_dim: int,
    length: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Zeroed buffers on the devices, by name."""
    local = (batch // mesh.shape.data, slots // mesh.shape.model, length, head_dim)
    return {
        name: mesh.put_shards(lambda _device: torch.zeros(local, dtype=dtype), CACHE_AXES)
        for name in cache_names(layers)
    }


def grow(old: Mapping[str, torch.Tensor], mesh: DeviceMesh, length: int) -> dict[str, torch.Tensor]:
    """A step: the same contents in buffers of `length` positions."""
    grown = {}
    for name, tensor in old.items():
        grown[name] = mesh.mark(
            torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[2])), CACHE_AXES
        )
    return grown


@dataclass(frozen=True)
class LayerKV:
    """What `StepCache.update` hands to attention in place of a tensor.

    Attributes:
        new: `[B, K, S, D]`, the positions of this step.
        cached: the layer's buffer as it came in, or None when nothing in it is visible.
        cache: the step's cache, for the write.
        layer: layer number.
    """

    new: torch.Tensor
    cached: torch.Tensor | None
    cache: StepCache
    layer: int

    @property
    def dtype(self) -> torch.dtype:
        return self.new.dtype


class StepCache:
    """The cache as transformers' models see it within one step. It lives while the step is traced.

    Args:
        buffers: by the names of `names`; replaced by their updated versions as the layers write.
        starts: `[B]` int32, where each row's new positions begin.
        fresh: nothing in the buffers is visible yet.
    """

    is_compileable = False

    def __init__(
        self,
        mesh: DeviceMesh,
        buffers: dict[str, torch.Tensor],
        starts: torch.Tensor,
        *,
        fresh: bool,
    ) -> None:
        self.buffers = buffers
        self.mesh = mesh
        self._starts = starts
        self._fresh = fresh

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked by transformers only where it would count positions itself; the steps here always pass them."""
        raise AssertionError("positions are passed explicitly")

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[LayerKV, LayerKV]:
        """Called by a layer with its new keys and values, `[B, K, S, D]` each."""

        def stream(kind: str, new: torch.Tensor) -> LayerKV:
            cached = None if self._fresh else self.buffers[f"cache.{kind}.{layer_idx}"]
            return LayerKV(new=new, cached=cached, cache=self, layer=layer_idx)

        return stream("key", key), stream("value", value)

    def write(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, after: torch.Tensor
    ) -> None:
        """Write new positions, `[B, K, S, D]` each; `after` is a tensor of that shape that must be computed before."""
        if not self.buffers:  # a step that only wants logits
            return
        order = after * 0
        self._write(f"cache.key.{layer}", key + order)
        self._write(f"cache.value.{layer}", value + order)

    def _write(self, name: str, new: torch.Tensor) -> None:
        mesh, buffer = self.mesh, self.buffers[name]
        updated = row_update(
            mesh.enter_manual(buffer, CACHE_AXES),
            mesh.enter_manual(new, CACHE_AXES),
            mesh.enter_manual(self._starts, (DATA,)),
        )
        self.buffers[name] = mesh.leave_manual(updated, CACHE_AXES, buffer.shape)
