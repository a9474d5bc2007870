"""Move tensors from one mesh and layout to another, while the model lives.

They go one by one over the host, each freed before its successor is made. Nothing is read from the
checkpoint again. Both meshes are over the devices of this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..engine.interface import Engine
from ..errors import FitError, lines
from ..host import high_water_bytes, lean_host_memory, restart_high_water, rss_bytes
from ..plan.mesh_shape import MeshShape
from . import repeats
from .layout import Layout, cut, undo

_TRIMS = 8
"""How often freed memory is given back while as much is moved as the largest tensor has.

Moving leaves holes in the heap, of twice as many bytes, that the next tensors don't fit into.
"""


@dataclass(frozen=True, kw_only=True)
class Resharding:
    """What a move took.

    Attributes:
        before, after: the meshes.
        tensors, bytes: moved: how many, and what they take on the new mesh's devices together.
        largest_tensor_bytes: as the host held it, in the checkpoint's layout.
        peak_device_bytes: most that old and new tensors together took on any one device.
        baseline_rss_bytes: memory of the process before.
        peak_rss_bytes: the most that the process held meanwhile; ever, where the system can't tell.
        programs: compiled for moving, one a shape and placement of large replicated tensors.
        move_s: of moving.
        compile_s: of making the programs that go on from there; 0 where nothing runs.
    """

    before: MeshShape
    after: MeshShape
    tensors: int
    bytes: int
    largest_tensor_bytes: int
    peak_device_bytes: int
    baseline_rss_bytes: int
    peak_rss_bytes: int
    programs: int
    move_s: float
    compile_s: float = 0.0


def relay(
    take: Callable[[], torch.Tensor],
    mesh: Engine,
    old: Layout,
    new_mesh: Engine,
    new: Layout,
    rows: int | None = None,
) -> torch.Tensor:
    """A device tensor of layout `old` in layout `new`; bit-equal in the checkpoint's layout.

    Args:
        take: gives the tensor, and lets go of it if it shall be freed before the new one is made.
        rows: kept of the first dim, where the layouts differ in its size; zeros follow.
    """
    whole = undo(repeats.fetch(mesh, take, old.axes), old.blocks)
    if rows is not None and old.shape[0] != new.shape[0]:
        whole = torch.cat([whole[:rows], whole.new_zeros(new.shape[0] - rows, *whole.shape[1:])])
    return repeats.put(
        new_mesh,
        lambda axes, device: cut(whole.__getitem__, replace(new, axes=axes), device, whole.dtype),
        new.shape,
        whole.dtype,
        new.axes,
    )


class Mover:
    """Moves tensors from one mesh to another, and counts.

    Args:
        tensors: all that will be moved.
        progress: called with bytes moved, and all.
    """

    def __init__(
        self,
        mesh: Engine,
        new_mesh: Engine,
        tensors: Iterable[torch.Tensor],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if mesh.shape.devices != new_mesh.shape.devices:
            raise FitError(
                lines(
                    f"mesh {new_mesh.shape} has {new_mesh.shape.devices} devices",
                    f"expected {mesh.shape.devices}, as before",
                )
            )
        self.mesh = mesh
        self.new_mesh = new_mesh
        self._progress = progress
        self._began = time.perf_counter()
        self._tensors = self._bytes = self._largest = self._done = self._total = self._programs = 0
        self._held = [0] * mesh.shape.devices
        for tensor in tensors:
            self._hold(mesh.local_bytes(tensor))
            self._total += math.prod(tensor.shape) * tensor.element_size()
        self._peak = max(self._held)
        self._baseline = rss_bytes()
        restart_high_water()

    def _hold(self, bytes_per_device: Iterable[int]) -> None:
        self._held = [have + more for have, more in zip(self._held, bytes_per_device, strict=True)]

    def __call__(
        self,
        tensors: dict[str, torch.Tensor],
        old: Callable[[str], Layout],
        new: Callable[[str], Layout],
        *,
        rows: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Move named tensors.

        The dict is emptied on the way, so that each is freed unless somebody else holds it.

        Args:
            old, new: a tensor's name to its layout before and after.
            rows: see `relay`.
        """
        moved: dict[str, torch.Tensor] = {}
        names, becomes = (
            list(tensors),
            {
                name: new(name).device_bytes(tensor.element_size())
                for name, tensor in tensors.items()
            },
        )
        grows = sum(becomes.values()) > sum(
            sum(self.mesh.local_bytes(tensor)) for tensor in tensors.values()
        )
        waiting, compiled = 0, self.new_mesh.compilations()
        with lean_host_memory() as give_back:
            # The largest while there is most room: its copies then add nothing to the peak.
            for name in sorted(names, key=becomes.__getitem__, reverse=grows):
                tensor = tensors[name]
                freed = self.mesh.local_bytes(tensor)
                size = math.prod(tensor.shape) * tensor.element_size()
                del tensor  # `relay` frees it
                moved[name] = relay(
                    partial(tensors.pop, name), self.mesh, old(name), self.new_mesh, new(name), rows
                )
                waiting += size
                if _TRIMS * waiting >= self._largest:
                    give_back()
                    waiting = 0
                made = self.new_mesh.local_bytes(moved[name])
                self._hold(made)
                self._peak = max(self._peak, *self._held)
                self._hold(-gone for gone in freed)
                self._tensors += 1
                self._bytes += sum(made)
                self._largest = max(self._largest, size)
                self._done += size
                if self._progress is not None:
                    self._progress(self._done, self._total)
            self.new_mesh.wait()
        self._programs += self.new_mesh.compilations() - compiled
        return {name: moved[name] for name in names}

    def result(self, compile_s: float = 0.0) -> Resharding:
        """What it took, until now."""
        return Resharding(
            before=self.mesh.shape,
            after=self.new_mesh.shape,
            tensors=self._tensors,
            bytes=self._bytes,
            largest_tensor_bytes=self._largest,
            peak_device_bytes=self._peak,
            baseline_rss_bytes=self._baseline,
            peak_rss_bytes=max(
                self._baseline, high_water_bytes()
            ),  # the system counts both in batches
            programs=self._programs,
            move_s=time.perf_counter() - self._began - compile_s,
            compile_s=compile_s,
        )


def another_mesh(mesh: Engine, shape: Engine | MeshShape | str | tuple[int, ...] | None) -> Engine:
    """A mesh of this shape over the devices of `mesh`.

    Raises:
        FitError: it has another number of devices.
    """
    if isinstance(shape, Engine):
        return shape
    wanted = mesh.shape if shape is None else MeshShape.parse(shape)
    if wanted.devices != mesh.shape.devices:
        raise FitError(
            lines(
                f"mesh {wanted} has {wanted.devices} devices, the model is on {mesh.shape.devices}",
                "a process has one device count for its whole life",
                "use a mesh of as many devices, or another process",
            )
        )
    if wanted == mesh.shape:
        return mesh
    return mesh.reshaped(wanted)
