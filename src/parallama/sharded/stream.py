"""A checkpoint's tensors onto the devices, slice by slice.

While one tensor is transferred, the next ones are read, cast and laid out. A single CPU device
adopts what was read instead. Besides what is on the devices, the host holds about as much of the
model as its largest tensor.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from ..engine.interface import Engine
from ..files import nonfinite
from ..files.tensor_source import Slices, TensorSource
from ..host import lean_host_memory, peak_rss_bytes, reused_host_memory, rss_bytes
from ..plan.placement import Axes, Plan
from . import repeats
from .device_weights import DeviceWeights
from .layout import Layout, cut

_READERS = 2
_AHEAD = 4
"""Tensors that are made ready while one is transferred."""
_Parts = Future[dict[int, torch.Tensor]]
_Read = Callable[..., _Parts]
"""`parts`, done by a reader."""
_Memory = Callable[[], contextlib.AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True, kw_only=True)
class StreamStats:
    """What a transfer took.

    Attributes:
        seconds: of wall clock, from the first byte to the last.
        bytes_read: of the checkpoint: each slice as often as it was read.
        largest_tensor_bytes: on all devices together, each distinct part counted once.
        baseline_rss_bytes: memory of the process before.
        peak_rss_bytes: the most memory that the process has held until then.
    """

    seconds: float
    bytes_read: int
    largest_tensor_bytes: int
    baseline_rss_bytes: int
    peak_rss_bytes: int

    @property
    def bytes_per_s(self) -> float:
        """Of the checkpoint, as it was read."""
        return self.bytes_read / self.seconds


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How a tensor reaches the devices.

    Attributes:
        split: axes that it is split over while it is transferred.
        axes: that it is split over in the end.
        copies: that are made of it on the host meanwhile, one of each device's part.
    """

    split: Axes
    axes: Axes
    copies: int

    @classmethod
    def of(cls, layout: Layout, dtype: torch.dtype) -> _Way:
        """Of a tensor with this layout.

        What the mesh replicates is transferred once if the devices then put it together along the
        first dim. Along another dim that takes longer, and as many copies on the devices.
        """
        split = repeats.transferred_axes(layout.shape, dtype.itemsize, layout.axes, layout.mesh)
        if split[:1] == tuple(layout.axes[:1]):
            split = layout.axes
        return cls(
            split=split,
            axes=layout.axes,
            copies=layout.mesh.devices // len(set(layout.mesh.holders(split))),
        )


def parts(
    source: TensorSource,
    plan: Plan,
    dtype: torch.dtype,
    devices: Collection[int],
    *,
    axes: Axes | None = None,
    own: bool = False,
    allow_nonfinite: bool = False,
) -> dict[int, torch.Tensor]:
    """The parts of a tensor that some devices hold, each distinct one once.

    Nothing else of the tensor is read.

    Args:
        axes: that the tensor is split over meanwhile, if not those of the plan.
        own: each part has memory of its own.

    Raises:
        CheckpointError: what is read holds NaN or infinity, or does so in `dtype`, unless that is
            allowed.

    Returns:
        Device to part, cast and laid out; views of the source where they can be. The devices are
        those of `MeshShape.holders`.
    """
    layout = Layout.of(plan, source.name)
    if axes is not None:
        layout = replace(layout, axes=tuple(axes))
    holders = plan.mesh.holders(layout.axes)
    wanted = dict.fromkeys(holders[device] for device in devices)

    def refuse(part: torch.Tensor) -> None:
        if not allow_nonfinite:
            nonfinite.refuse(source.name, part, source.file, dtype)

    read: Callable[[Slices], torch.Tensor]
    if 1 < len(wanted) == len(set(holders)):
        # All is read at once: each step of a reader waits for the transfer's interpreter lock.
        whole = source.read()
        refuse(whole)
        read = whole.__getitem__
    else:
        read = functools.partial(source.read_as, dtype=dtype, look=refuse)
    return {device: cut(read, layout, device, dtype, own=own) for device in wanted}


def put(
    sources: Sequence[TensorSource],
    plan: Plan,
    mesh: Engine,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> tuple[DeviceWeights, StreamStats]:
    """Move every parameter of a plan to the devices.

    Args:
        sources: all of them, in any order, with the shapes that the plan expects.
        progress: called with bytes of the checkpoint done, and all.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, unless that is allowed.
    """
    began, baseline = time.perf_counter(), rss_bytes()
    # The largest first, while little else is there: then its copies don't add to the peak.
    ordered = sorted(sources, key=lambda source: source.nbytes, reverse=True)
    done, total = 0, sum(source.nbytes for source in sources)
    sizes = {
        source.name: math.prod(int(size) for size in plan[source.name].shape) * dtype.itemsize
        for source in sources
    }
    largest, since, on_devices = max(sizes.values(), default=0), 0, 0
    make = functools.partial(
        parts,
        plan=plan,
        dtype=dtype,
        devices=range(mesh.shape.devices),
        allow_nonfinite=allow_nonfinite,
    )
    tensors: dict[str, torch.Tensor] = {}
    # One heap for all copies is fastest. But on one device a transfer overlaps the next tensor and
    # holds twice as much, and copies for rows of the mesh leave holes in the heap.
    memory: _Memory = (
        reused_host_memory if mesh.shape.devices > 1 and mesh.shape.data == 1 else lean_host_memory
    )
    readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
    try:
        with memory() as give_back, _one_thread_each():
            if mesh.traits.adopts:
                arriving = _adopted(
                    ordered, sizes, mesh, functools.partial(readers.submit, make, own=True)
                )
            else:
                ways = {name: _Way.of(Layout.of(plan, name), dtype) for name in sizes}
                arriving = _transferred(
                    ordered, sizes, ways, mesh, functools.partial(readers.submit, make)
                )
            for source, tensor in arriving:
                tensors[source.name] = tensor
                source.release()
                done += source.nbytes
                since += sizes[source.name]
                if mesh.traits.in_host_memory:
                    on_devices += Layout.of(plan, source.name).device_bytes(dtype.itemsize)
                # What was freed leaves holes, and the next tensors fit into about half of them.
                if 2 * since >= largest and 2 * (rss_bytes() - baseline - on_devices) >= largest:
                    give_back()
                    since = 0
                if progress is not None:
                    progress(done, total)
            mesh.wait()
    finally:
        readers.shutdown(cancel_futures=True)
    stats = StreamStats(
        seconds=time.perf_counter() - began,
        bytes_read=sum(source.bytes_read for source in sources),
        largest_tensor_bytes=largest,
        baseline_rss_bytes=baseline,
        peak_rss_bytes=peak_rss_bytes(),
    )
    tensors = {placement.name: tensors[placement.name] for placement in plan.parameters}
    return DeviceWeights(plan=plan, mesh=mesh, tensors=tensors), stats


def _transferred(
    sources: Sequence[TensorSource],
    sizes: Mapping[str, int],
    ways: Mapping[str, _Way],
    mesh: Engine,
    read: _Read,
) -> Iterator[tuple[TensorSource, torch.Tensor]]:
    """Sources and their device tensors, one after another.

    While one is transferred, the next are read. Those under way are together never larger than the
    largest.
    """
    waiting, ready = deque(sources), deque[tuple[TensorSource, _Parts]]()
    most, under_way = max(sizes.values(), default=0), 0
    while waiting or ready:
        while waiting and (not ready or len(ready) < _AHEAD):
            following = waiting[0].name
            if (
                ready
                and under_way
                + sizes[ready[0][0].name] * ways[ready[0][0].name].copies
                + sizes[following]
                > most
            ):
                break
            under_way += sizes[following]
            source = waiting.popleft()
            ready.append((source, read(source, axes=ways[following].split)))
        source, made = ready.popleft()
        way = ways[source.name]
        shard = made.result().pop
        del made
        yield source, repeats.put_split(mesh, shard, way.split, way.axes)
        under_way -= sizes[source.name]


def _adopted(
    sources: Sequence[TensorSource], sizes: Mapping[str, int], mesh: Engine, read: _Read
) -> Iterator[tuple[TensorSource, torch.Tensor]]:
    """Sources and their device tensors, whose memory the readers have filled.

    A tensor may be there twice while it is read: as it is stored, and as the device takes it. The
    next is begun only if all of them, with those that have arrived, take no more than what the
    device will hold and the largest tensor.
    """
    waiting, ready = deque(sources), deque[tuple[TensorSource, _Parts]]()
    left = sum(sizes.values()) + max(sizes.values(), default=0)
    while waiting or ready:
        while waiting and (not ready or waiting[0].nbytes + sizes[waiting[0].name] <= left):
            source = waiting.popleft()
            left -= source.nbytes + sizes[source.name]
            ready.append((source, read(source)))
        source, made = ready.popleft()
        part = made.result().pop
        del made
        yield source, mesh.adopt(part(0))
        left += source.nbytes


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within it torch uses one thread for an operation.

    The readers and the transfer keep the cores busy. More threads would spin while they wait.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
