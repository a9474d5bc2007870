"""What a mesh repeats crosses between host and devices once: it is split over the axes that repeat it before it leaves, and repeated on the devices after it came.

torch-xla copies every device's part to the host, and on the way to the devices copies every part once more before the runtime does. On a mesh such as 8x1 that would be eight copies
of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..engine.interface import Axes, Engine
from ..plan.mesh_shape import MeshShape

_Axes = tuple[str | None, ...]
WORTH_BYTES = 1 << 22
"""Copies of fewer bytes are cheaper than the program that avoids them."""


def without_repeats(shape: tuple[int, ...], axes: Axes, mesh: MeshShape) -> _Axes:
    """How a tensor lies if axes that don't split it do so, as far as one of its dims divides; each dim takes one axis."""
    split = list(axes)
    for axis, parts in mesh.items():
        if parts == 1 or axis in split:
            continue
        for dim, (size, taken) in enumerate(zip(shape, split, strict=True)):
            if (taken is None or mesh.size(taken) == 1) and size % parts == 0:
                split[dim] = axis
                break
    return tuple(split)


def crossing(shape: tuple[int, ...], itemsize: int, axes: Axes, mesh: MeshShape) -> _Axes:
    """How a tensor lies while it crosses: `without_repeats` where that is worth a program, otherwise as `axes` say."""
    split = without_repeats(shape, axes, mesh)
    whole = math.prod(shape) * itemsize
    saved = whole * (
        math.prod(mesh.size(axis) for axis in split if axis)
        // math.prod(mesh.size(axis) for axis in axes if axis)
        - 1
    )
    return split if saved >= WORTH_BYTES else tuple(axes)


def fetch(mesh: Engine, take: Callable[[], torch.Tensor], axes: Axes) -> torch.Tensor:
    """Bring a device tensor that lies as `axes` say to the host, each part of it once where it is large. May compile a program, one for every shape and placement.

    Args:
        take: gives the tensor, and is called once: who has no other use for it gives it away, so that it is freed before its numbers reach the host.
    """
    tensor = take()
    split = crossing(tuple(tensor.shape), tensor.element_size(), axes, mesh.shape)
    if split != tuple(axes):
        tensor = mesh.relay(tensor, split)
    return mesh.fetch(tensor, split)


def put(
    mesh: Engine,
    part: Callable[[_Axes, int], torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    axes: Axes,
) -> torch.Tensor:
    """Make a tensor from parts on the host, as `Engine.put_shards` does, each of which reaches the devices once where they are large.

    Args:
        part: how the tensor shall lie and a device's number to that device's part of it.
        shape: of the whole.
    """
    split = crossing(shape, dtype.itemsize, axes, mesh.shape)
    return put_crossing(mesh, lambda device: part(split, device), split, axes)


def put_crossing(
    mesh: Engine, shard: Callable[[int], torch.Tensor], split: Axes, axes: Axes
) -> torch.Tensor:
    """Make a tensor that lies as `axes` say from parts that cross as `split` says; see `Engine.put_shards`."""
    arrived = mesh.put_shards(shard, split)
    return arrived if tuple(split) == tuple(axes) else mesh.relay(arrived, axes)
