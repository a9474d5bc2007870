"""A named mesh over the devices of this process: put tensors on it, mark them, bring them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from . import backends
from .errors import FitError, lines
from .plugins import OptionValue
from .topology import AXES, MeshShape

if TYPE_CHECKING:
    import torch

Axes = Sequence[str | None]
_ALIGNMENT = 64
"""Bytes; XLA's, and torch's, too."""


class DeviceMesh:
    """All devices of the process as a `data` x `model` grid.

    Args:
        shape: `1x8`, `data=2,model=4`, or a `MeshShape`.
        backend, backend_options: see `backends.start`.
        devices: device count of the process; follows from the shape if None.

    Raises:
        FitError: the mesh does not cover the devices exactly.
        BackendError: the backend is not available.

    Example:
        >>> mesh = DeviceMesh("1x8")
        >>> mesh.shape.model
        8
    """

    def __init__(
        self,
        shape: MeshShape | str | tuple[int, int],
        *,
        backend: str = "cpu",
        backend_options: Mapping[str, OptionValue] | None = None,
        devices: int | None = None,
    ) -> None:
        self.shape = MeshShape.parse(shape)
        if devices is not None and devices != self.shape.devices:
            raise FitError(
                lines(
                    f"mesh {self.shape} has {self.shape.devices} devices, but --devices is {devices}",
                    "a mesh covers all devices of the process",
                    f"use a mesh such as 1x{devices}",
                )
            )
        self.backend = backends.start(backend, self.shape.devices, backend_options, grid=(self.shape.data, self.shape.model))
        import torch_xla

        self._xla: Any = torch_xla
        self.device: torch.device = torch_xla.device()
        self.spmd = self.shape.devices > 1
        if self.spmd:
            import numpy as np
            from torch_xla.distributed import spmd

            self._spmd: Any = spmd
            self._mesh = spmd.Mesh(np.arange(self.shape.devices), (self.shape.data, self.shape.model), AXES)

    def __repr__(self) -> str:
        return f"DeviceMesh({self.shape}, backend={self.backend.name!r})"

    def put(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """Move a whole host tensor to the devices, split over `axes` (one per dim); every dim divides by its axis."""
        return self.put_shards(lambda device: tensor[self.local_slices(tensor.shape, axes, device)].contiguous(), axes)

    def put_shards(self, shard: Callable[[int], torch.Tensor], axes: Axes) -> torch.Tensor:
        """Make a tensor from each device's own part, without ever holding the whole.

        Args:
            shard: device number to its part on the host, contiguous. Called once for every distinct part, with `MeshShape.holders`.
            axes: mesh axis of every dim.
        """
        if not self.spmd:
            # Not `to`, which keeps the host's tensor until the device first needs it.
            return self._xla._XLAC._xla_tensors_from_aten([shard(0)], [str(self.device)], None)[0]
        holders = self.shape.holders(tuple(axes))
        parts = {device: shard(device) for device in dict.fromkeys(holders)}
        return self._xla._XLAC._global_tensor_from_cpu_shards(
            [parts[device] for device in holders], self._mesh.get_op_sharding(tuple(axes))
        )

    @property
    def in_host_memory(self) -> bool:
        """Whether what lies on the devices lies in the host's memory."""
        return self.backend.name == "cpu"

    @property
    def shares_host_memory(self) -> bool:
        """Whether `take_over` can be used: on one CPU device. Under SPMD torch-xla's way ends the process."""
        return not self.spmd and self.in_host_memory

    def take_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make a host tensor the device's, with its memory and without a copy; nobody else may write to that any more.

        XLA neither writes to such a buffer nor frees it: a program that it is donated to copies it first. The memory is freed when the device tensor is gone, and the last program that reads it.

        Args:
            tensor: contiguous, with memory of its own that begins at a multiple of 64 bytes, as what torch allocates does.
        """
        from torch_xla.utils.dlpack import from_dlpack

        assert self.shares_host_memory and tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0
        return from_dlpack(tensor)

    def mark(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """Say how a device tensor lies; inside a traced step this pins an intermediate."""
        if self.spmd:
            self._spmd.mark_sharding(tensor, self._mesh, tuple(axes))
        return tensor

    def enter_manual(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """Within a step: from here on `tensor` is each device's own part, and what is computed from it stays there."""
        if not self.spmd:
            return tensor
        return self._spmd.enable_manual_sharding(tensor, tuple(axes), mesh=self._mesh).global_tensor

    def leave_manual(self, tensor: torch.Tensor, axes: Axes, shape: Sequence[int]) -> torch.Tensor:
        """Within a step: each device's own part becomes a part of a tensor of `shape` again."""
        if not self.spmd:
            return tensor
        import torch

        return self._spmd.disable_manual_sharding(tensor, tuple(axes), torch.Size(shape), mesh=self._mesh).global_tensor

    def groups(self, *axes: str) -> list[list[int]]:
        """The devices that take part together in a collective along these axes."""
        together: dict[tuple[int, ...], list[int]] = {}
        for device in range(self.shape.devices):
            coordinates = self.shape.coordinates(device)
            together.setdefault(tuple(coordinates[axis] for axis in AXES if axis not in axes), []).append(device)
        return list(together.values())

    def all_reduce(self, tensor: torch.Tensor, *axes: str, kind: Literal["sum", "max"] = "sum") -> torch.Tensor:
        """Within a manually partitioned region: the sum or maximum of every device's tensor along these axes, on each of them."""
        axes = tuple(axis for axis in axes if self.shape.size(axis) > 1)
        return self._xla._XLAC._xla_spmd_all_reduce(kind, tensor, 1.0, self.groups(*axes)) if axes else tensor

    def all_gather(self, tensor: torch.Tensor, axis: str, dim: int) -> torch.Tensor:
        """Within a manually partitioned region: every device's part along an axis, put together along a dim."""
        parts = self.shape.size(axis)
        if parts == 1:
            return tensor
        # torch-xla orders all-gathers by a token: each would wait for the one before, and keep it alive when nobody needs it.
        self._xla._XLAC._set_all_reduce_token(str(self.device), None)
        return self._xla._XLAC._xla_all_gather(tensor, dim, parts, self.groups(axis), False, 1, True)

    def reduce_scatter(self, tensor: torch.Tensor, axis: str, dim: int) -> torch.Tensor:
        """Within a manually partitioned region: each device's part, along a dim, of the sum of all tensors along an axis."""
        parts = self.shape.size(axis)
        return self._xla._XLAC._xla_spmd_reduce_scatter("sum", tensor, 1.0, dim, parts, self.groups(axis)) if parts > 1 else tensor

    def local_shards(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Each device's part, on the host, in device order; compiles nothing."""
        if not self.spmd:
            return [tensor.cpu()]
        self.wait()  # a result of a program still in flight has no shards yet
        return [shard for shard, _ in self._xla._XLAC._get_local_shards([tensor])[0]]

    def local_parts(self, tensor: torch.Tensor) -> list[tuple[slice, ...]]:
        """Each device's slices of a tensor, with start and stop of every dim, by the runtime's word; nothing is copied."""
        whole = tuple(slice(0, size) for size in tensor.shape)
        if not self.spmd:
            return [whole]
        parts = self._xla._XLAC._get_local_shard_replica_and_indices([tensor])[0]
        return [whole if slices is Ellipsis else tuple(slice(part.start, part.stop) for part in slices) for _, slices in parts]

    def local_shapes(self, tensor: torch.Tensor) -> list[tuple[int, ...]]:
        """The shape of each device's part, from the slices that the runtime says lie there; nothing is copied."""
        return [tuple(part.stop - part.start for part in parts) for parts in self.local_parts(tensor)]

    def local_bytes(self, tensor: torch.Tensor) -> list[int]:
        """Bytes that each device holds of a tensor, by the runtime's word."""
        return [math.prod(shape) * tensor.element_size() for shape in self.local_shapes(tensor)]

    def fetch(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """Bring a device tensor that lies as `axes` say back to the host; compiles nothing."""
        import torch

        if not self.spmd:
            return tensor.cpu()
        shards = self.local_shards(tensor)
        if all(axis is None for axis in axes):
            return shards[0]
        whole = torch.empty(tensor.shape, dtype=shards[0].dtype)
        for device in range(len(shards)):
            whole[self.local_slices(tensor.shape, axes, device)] = shards[device]
            shards[device] = whole  # each part is freed when it has its place
        return whole

    def local_slices(self, shape: Sequence[int], axes: Axes, device: int) -> tuple[slice, ...]:
        """Which part of a tensor of `shape` lies on a device."""
        coordinates = self.shape.coordinates(device)
        slices = []
        for size, axis in zip(shape, axes, strict=True):
            if axis is None:
                slices.append(slice(None))
                continue
            parts = self.shape.size(axis)
            if size % parts:
                raise FitError(lines(f"a dim of size {size} does not divide over axis {axis!r} ({parts} devices)"))
            step = size // parts
            slices.append(slice(coordinates[axis] * step, (coordinates[axis] + 1) * step))
        return tuple(slices)

    def run(self) -> None:
        """Compute everything that was traced so far and not run yet, in one program."""
        self._xla.sync()

    def wait(self) -> None:
        """Return when every device has finished what it was given."""
        import torch_xla.core.xla_model as xm

        xm.wait_device_ops()
