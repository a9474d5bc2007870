"""The static KV cache: buffers of keys and values, split over rows and heads, written in place.

Each layer has two buffers, `[B, K, T, D]`: a position is one stretch of `D` numbers a head, so
writing it touches few pages.
"""

# A step that both updates a donated buffer and multiplies with it makes XLA copy the buffer:
# nothing tells it that the product comes first. So attention reads the buffers as they came in and
# handles the new positions apart, and the write depends on attention's result. With that order
# fixed the update happens in place, for any number of heads and rows a device.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...plan.mesh_shape import DATA
from ..steps import CACHE_AXES
from .mesh import DeviceMesh
from .ops import row_update
from .ordering import each_after


def grow(old: Mapping[str, torch.Tensor], mesh: DeviceMesh, length: int) -> dict[str, torch.Tensor]:
    """A step: the same contents in buffers of `length` positions."""
    grown = {}
    for name, tensor in old.items():
        padding = (0, 0, 0, length - tensor.shape[2])
        grown[name] = mesh.mark(torch.nn.functional.pad(tensor, padding), CACHE_AXES)
    return grown


@dataclass(frozen=True)
class LayerKV:
    """What `StepCache.update` gives to attention in place of a tensor.

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
    """The cache as transformers' models see it within one step. It lives while that is traced.

    Args:
        buffers: by the names of `steps.cache_names`; each is replaced when its layer has written.
        starts: `[B]` int32, where each row's new positions begin.
        fresh: nothing in the buffers is visible yet.
        first_row: `[data]` int32, split over it: the row of each device's buffers that its first
            row stands for; None if the step has all rows.
        visible: `[B]` int32, how many places each row sees; those before its start if None.
    """

    is_compileable = False

    def __init__(
        self,
        mesh: DeviceMesh,
        buffers: dict[str, torch.Tensor],
        starts: torch.Tensor,
        *,
        fresh: bool,
        first_row: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> None:
        self.buffers = buffers
        self.visible = starts if visible is None else visible
        self._first_row = first_row
        self.mesh = mesh
        self._starts = starts
        self._fresh = fresh

    @property
    def in_slots(self) -> bool:
        """Whether the step's rows are some of the buffers' rows."""
        return self._first_row is not None

    def first_row(self) -> torch.Tensor:
        """Within a manual region: the first of a device's rows in its buffers, int32 scalar."""
        if self._first_row is None:
            zero = torch.zeros((), dtype=torch.int32, device=self._starts.device)
            return self.mesh.enter_manual(zero, ())
        return self.mesh.enter_manual(self._first_row, (DATA,)).reshape(())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Transformers asks only where it would count positions; the steps here pass them."""
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
        """Write new positions, `[B, K, S, D]` each.

        Args:
            after: must be computed before; of the same shape.
        """
        if not self.buffers:  # a step that only wants logits
            return
        key, value = each_after(after, key, value)
        self._write(f"cache.key.{layer}", key)
        self._write(f"cache.value.{layer}", value)

    def _write(self, name: str, new: torch.Tensor) -> None:
        mesh, buffer = self.mesh, self.buffers[name]
        updated = row_update(
            mesh.enter_manual(buffer, CACHE_AXES),
            mesh.enter_manual(new, CACHE_AXES),
            self.first_row(),
            mesh.enter_manual(self._starts, (DATA,)),
        )
        self.buffers[name] = mesh.leave_manual(updated, CACHE_AXES, buffer.shape)
