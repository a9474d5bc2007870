"""How tensors are laid out on a mesh: cut from the checkpoint's, and put together again.

A checkpoint's tensor becomes a laid-out one block by block (head groups repeated or padded, sizes
padded with zeros). Each device's part is cut straight from the checkpoint's tensor: the laid-out
whole never exists.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..files.tensor_source import Slices
from ..plan import heads
from ..plan.mesh_shape import MeshShape
from ..plan.placement import Axes, Blocks, Placement, Plan

Run = tuple[int, int]
"""Of a dim: a start in the checkpoint's tensor (or `heads.EMPTY`), and a length."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor is placed on a mesh.

    Attributes:
        shape: over all devices.
        axes: for every dim the mesh axis it is split over, or None.
        blocks: how one dim is made from the checkpoint's; None where all are as there.
    """

    mesh: MeshShape
    shape: tuple[int, ...]
    axes: Axes
    blocks: Blocks | None = None

    @classmethod
    def of(cls, plan: Plan, name: str) -> Layout:
        """Of a parameter, and of what has a number for each of its: gradient, optimizer state."""
        placement = plan[name]
        return cls(
            mesh=plan.mesh,
            shape=tuple(int(size) for size in placement.shape),
            axes=placement.axes,
            blocks=plan.blocks(name),
        )

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of each device's part."""
        return tuple(
            size // self.mesh.size(axis) for size, axis in zip(self.shape, self.axes, strict=True)
        )

    def device_bytes(self, itemsize: int) -> int:
        """Bytes on all devices together, of numbers of so many bytes."""
        return math.prod(self.local_shape) * self.mesh.devices * itemsize


def device_part(
    source: torch.Tensor, plan: Plan, placement: Placement, device: int
) -> torch.Tensor:
    """One device's part of a parameter, cut from the checkpoint's tensor.

    Args:
        source: of shape `placement.source_shape`, any dtype.

    Returns:
        A tensor of shape `placement.local_shape(plan.mesh)`; a view where it can be one.
    """
    return cut(source.__getitem__, Layout.of(plan, placement.name), device, source.dtype)


def cut(
    read: Callable[[Slices], torch.Tensor],
    layout: Layout,
    device: int,
    dtype: torch.dtype,
    *,
    own: bool = False,
) -> torch.Tensor:
    """One device's part of a tensor, from slices of the checkpoint's tensor.

    Only those slices are asked for that the part is made of.

    Args:
        read: slices of every dim to what is there, of any dtype.
        own: the part is contiguous, and all that is in its memory.

    Returns:
        A tensor of `dtype` and of shape `layout.local_shape`. It is what was read itself, if that
        is the part as it is; otherwise a copy, cast and laid out at once.
    """
    blocks, coordinates = layout.blocks, layout.mesh.coordinates(device)
    spans: list[list[Run]] = []
    for dim, (step, axis) in enumerate(zip(layout.local_shape, layout.axes, strict=True)):
        first = step * (coordinates[axis] if axis is not None else 0)
        if blocks is not None and blocks.dim == dim:
            spans.append(list(runs(blocks.sources, first, step, blocks.block)))
        else:
            spans.append([(first, step)])
    if all(len(found) == 1 and found[0][0] != heads.EMPTY for found in spans):
        part = read(tuple(slice(at, at + length) for ((at, length),) in spans))
        if part.dtype == dtype and (_fills_its_memory(part) or not own):
            return part
        return torch.empty(part.shape, dtype=dtype).copy_(part)
    whole = torch.empty(layout.local_shape, dtype=dtype)
    for pieces in itertools.product(*map(_placed, spans)):
        target = whole[tuple(slice(place, place + length) for place, _, length in pieces)]
        if any(at == heads.EMPTY for _, at, _ in pieces):
            target.zero_()
        else:
            target.copy_(read(tuple(slice(at, at + length) for _, at, length in pieces)))
    return whole


def _fills_its_memory(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _placed(spans: Iterable[Run]) -> Iterator[tuple[int, int, int]]:
    """Runs with the place in the part where each begins."""
    place = 0
    for at, length in spans:
        yield place, at, length
        place += length


def runs(sources: Sequence[int], first: int, count: int, block: int) -> Iterator[Run]:
    """The longest runs that make up a stretch of a laid-out dim.

    Args:
        sources: the source block of every block, or `EMPTY`.
        first, count: the stretch.
        block: length of a block.

    Yields:
        Start in the source, or `EMPTY`, and length.
    """
    position, end = first, first + count
    start, length = 0, 0
    while position < end:
        index, inside = divmod(position, block)
        take = min(block - inside, end - position)
        at = heads.EMPTY if sources[index] == heads.EMPTY else sources[index] * block + inside
        if length and (at == start + length if start != heads.EMPTY else at == heads.EMPTY):
            length += take
        else:
            if length:
                yield start, length
            start, length = at, take
        position += take
    yield start, length


def take_off(laid_out: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    """The checkpoint's tensor again, from a whole laid-out one."""
    return undo(laid_out, plan.blocks(name))


def undo(laid_out: torch.Tensor, blocks: Blocks | None) -> torch.Tensor:
    """A tensor as in the checkpoint, from a whole laid-out one; a view where it can be one."""
    if blocks is None:
        return laid_out
    first: dict[int, int] = {}
    for place, source in enumerate(blocks.sources):
        first.setdefault(source, place)
    count = max(blocks.sources) + 1
    places = torch.tensor([first[source] for source in range(count)])
    if torch.equal(places, torch.arange(count)):  # only padded, or not even that
        return laid_out.narrow(blocks.dim, 0, count * blocks.block)
    index = (places[:, None] * blocks.block + torch.arange(blocks.block)).flatten()
    return laid_out.index_select(blocks.dim, index)


def take_off_gradient(laid_out: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    """The gradient of the checkpoint's tensor, from that of a whole laid-out one.

    It is the adjoint of laying out. What is repeated (KV heads) gets the sum of its gradients. What
    is not in the checkpoint (zero heads, padded sizes) is dropped.
    """
    blocks = plan.blocks(name)
    if blocks is None:
        return laid_out
    places, sources = correspondence(blocks)
    shape = list(laid_out.shape)
    shape[blocks.dim] = blocks.block * (max(blocks.sources) + 1)
    return laid_out.new_zeros(shape).index_add_(
        blocks.dim, sources, laid_out.index_select(blocks.dim, places)
    )


def correspondence(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements of a laid-out dim that hold something of the checkpoint's.

    Returns:
        Their indices in the laid-out dim, and in the checkpoint's.
    """
    inside = torch.arange(blocks.block)
    held = [(place, source) for place, source in enumerate(blocks.sources) if source != heads.EMPTY]
    places, sources = (each[:, None] * blocks.block + inside for each in torch.tensor(held).t())
    return places.flatten(), sources.flatten()
