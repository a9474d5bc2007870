"""What a mesh replicates is transferred between host and devices once.

A tensor is split over the axes that replicate it before it leaves the devices, and replicated there
after it came. Otherwise each device's part would be copied, and on a mesh such as 8x1 that is eight
copies of a tensor.
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
    """How a tensor is split if the axes that replicate it split it, too.

    An axis is used where a dim divides by it; each dim takes one axis.
    """
    split = list(axes)
    for axis, parts in mesh.items():
        if parts == 1 or axis in split:
            continue
        for dim, (size, taken) in enumerate(zip(shape, split, strict=True)):
            if (taken is None or mesh.size(taken) == 1) and size % parts == 0:
                split[dim] = axis
                break
    return tuple(split)


def transferred_axes(shape: tuple[int, ...], itemsize: int, axes: Axes, mesh: MeshShape) -> _Axes:
    """How a tensor is split while it is transferred.

    It is `without_repeats` where that is worth a program, and `axes` otherwise.
    """
    split = without_repeats(shape, axes, mesh)
    whole = math.prod(shape) * itemsize
    saved = whole * (
        math.prod(mesh.size(axis) for axis in split if axis)
        // math.prod(mesh.size(axis) for axis in axes if axis)
        - 1
    )
    return split if saved >= WORTH_BYTES else tuple(axes)


def fetch(mesh: Engine, take: Callable[[], torch.Tensor], axes: Axes) -> torch.Tensor:
    """Bring a device tensor that is split over `axes` to the host; each part once, if it is large.

    May compile a program, one for every shape and placement.

    Args:
        take: gives the tensor, and is called once. If the caller keeps no reference, the tensor is
            freed before its numbers reach the host.
    """
    tensor = take()
    split = transferred_axes(tuple(tensor.shape), tensor.element_size(), axes, mesh.shape)
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
    """Make a tensor from parts on the host; each reaches the devices once, if they are large.

    Args:
        part: axes and a device's number to that device's part of a tensor split over these axes.
        shape: of the whole.
    """
    split = transferred_axes(shape, dtype.itemsize, axes, mesh.shape)
    return put_split(mesh, lambda device: part(split, device), split, axes)


def put_split(
    mesh: Engine, shard: Callable[[int], torch.Tensor], split: Axes, axes: Axes
) -> torch.Tensor:
    """Make a tensor split over `axes` from parts that are transferred split over `split`."""
    arrived = mesh.put_shards(shard, split)
    return arrived if tuple(split) == tuple(axes) else mesh.relay(arrived, axes)
