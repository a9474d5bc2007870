"""torch-xla's engine: a named mesh over the devices of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...errors import FitError, lines
from ...plan.mesh_shape import MeshShape
from ..devices.plugins import OptionValue
from ..interface import Axes, Engine, Traits
from . import backends, counters

if TYPE_CHECKING:
    import torch

    from ...plan.placement import Plan
    from .steps import TorchXlaSteps

_ALIGNMENT = 64
"""Bytes; XLA's, and torch's, too."""
_LOCK = threading.RLock()
"""One for the process: torch-xla has one set of devices and one list of pending graphs."""


class DeviceMesh(Engine):
    """All devices of the process as a `data` x `model` grid.

    Args:
        shape: `1x8`, `data=2,model=4`, or a `MeshShape`.
        backend, backend_options: see `backends.start`.
        devices: device count of the process; follows from the shape if None.
        keep_hlo: keep what XLA writes about its programs, for `Program.hlo`.

    Raises:
        FitError: the mesh does not cover the devices exactly.
        BackendError: the backend is not available.

    Example:
        >>> mesh = DeviceMesh("1x8")
        >>> mesh.shape.model
        8
    """

    backend: backends.XlaBackend
    lock = _LOCK

    def __init__(
        self,
        shape: MeshShape | str | tuple[int, ...],
        *,
        backend: str = "cpu",
        backend_options: Mapping[str, OptionValue] | None = None,
        devices: int | None = None,
        keep_hlo: bool = False,
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
        sizes = tuple(self.shape.values())
        self.backend = backends.start(
            backend, self.shape.devices, backend_options, grid=sizes, keep_hlo=keep_hlo
        )
        import torch_xla

        self._xla: Any = torch_xla
        self.device: torch.device = torch_xla.device()
        self.spmd = self.shape.devices > 1
        on_cpu = self.backend.name == "cpu"
        self.traits = Traits(
            in_host_memory=on_cpu,
            # Under SPMD torch-xla's way ends the process.
            adopts=on_cpu and not self.spmd,
            sum_bytes=4 if on_cpu else 1,  # XLA:CPU sums and gathers 16-bit numbers as fp32
            trains=True,
        )
        if self.spmd:
            import numpy as np
            from torch_xla.distributed import spmd

            self._spmd: Any = spmd
            self._mesh = spmd.Mesh(np.arange(self.shape.devices), sizes, tuple(self.shape))

    def __repr__(self) -> str:
        return f"DeviceMesh({self.shape}, backend={self.backend.name!r})"

    # -- the door

    def with_shape(self, shape: MeshShape) -> DeviceMesh:
        """See `Engine`."""
        options = self.backend.options
        return DeviceMesh(shape, backend=self.backend.name, backend_options=options)

    def put_shards(self, shard: Callable[[int], torch.Tensor], axes: Axes) -> torch.Tensor:
        """See `Engine`."""
        if not self.spmd:
            # Not `to`, which keeps the host's tensor until the device first needs it.
            return self._xla._XLAC._xla_tensors_from_aten([shard(0)], [str(self.device)], None)[0]
        holders = self.shape.holders(tuple(axes))
        parts = {device: shard(device) for device in dict.fromkeys(holders)}
        return self._xla._XLAC._global_tensor_from_cpu_shards(
            [parts[device] for device in holders], self._mesh.get_op_sharding(tuple(axes))
        )

    def adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Engine`. XLA neither writes to such a buffer nor frees it.

        A program that it is donated to copies it first. The memory is freed when the device tensor
        is gone, and the last program that reads it.
        """
        from torch_xla.utils.dlpack import from_dlpack

        assert self.traits.adopts and tensor.is_contiguous()
        assert tensor.data_ptr() % _ALIGNMENT == 0
        return from_dlpack(tensor)

    def shards(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `Engine`."""
        if not self.spmd:
            return [tensor.cpu()]
        self.wait()  # a result of a program still in flight has no shards yet
        return [shard for shard, _ in self._xla._XLAC._get_local_shards([tensor])[0]]

    def parts(self, tensor: torch.Tensor) -> list[tuple[slice, ...]]:
        """See `Engine`."""
        whole = tuple(slice(0, size) for size in tensor.shape)
        if not self.spmd:
            return [whole]
        parts = self._xla._XLAC._get_local_shard_replica_and_indices([tensor])[0]
        return [
            whole if slices is Ellipsis else tuple(slice(part.start, part.stop) for part in slices)
            for _, slices in parts
        ]

    def relay(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """See `Engine`."""
        from . import ops

        with self.lock:
            bits = ops.optimization_barrier(ops.as_bits(tensor.detach().clone()))
            moved = self.mark(bits, axes)
            same = ops.of_bits(moved, tensor.dtype)
            if same is not moved:
                self.mark(same, axes)
            del moved, bits
            self.run()
            self.wait()
        return same

    def steps(
        self, skeleton: Any, plan: Plan, weights: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> TorchXlaSteps:
        """See `Engine`."""
        from .steps import TorchXlaSteps

        return TorchXlaSteps(skeleton, self, plan, weights, dtype)

    def compilations(self) -> int:
        """See `Engine`; lazily run programs count, too."""
        return counters.compilations()

    def wait(self) -> None:
        """See `Engine`."""
        import torch_xla.core.xla_model as xm

        xm.wait_device_ops()

    def device_names(self) -> list[str]:
        """See `Engine`."""
        return backends.device_names()

    # -- for what is traced

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

        return self._spmd.disable_manual_sharding(
            tensor, tuple(axes), torch.Size(shape), mesh=self._mesh
        ).global_tensor

    def all_reduce(
        self, tensor: torch.Tensor, *axes: str, kind: Literal["sum", "max"] = "sum"
    ) -> torch.Tensor:
        """Within a manually partitioned region: the sum or maximum of every device's tensor along these axes, on each of them."""
        axes = tuple(axis for axis in axes if self.shape.size(axis) > 1)
        return (
            self._xla._XLAC._xla_spmd_all_reduce(kind, tensor, 1.0, self.shape.groups(*axes))
            if axes
            else tensor
        )

    def all_gather(self, tensor: torch.Tensor, axis: str, dim: int) -> torch.Tensor:
        """Within a manually partitioned region: every device's part along an axis, put together along a dim."""
        parts = self.shape.size(axis)
        if parts == 1:
            return tensor
        # torch-xla orders all-gathers by a token: each would wait for the one before, and keep it alive when nobody needs it.
        self._xla._XLAC._set_all_reduce_token(str(self.device), None)
        return self._xla._XLAC._xla_all_gather(
            tensor, dim, parts, self.shape.groups(axis), False, 1, True
        )

    def reduce_scatter(self, tensor: torch.Tensor, axis: str, dim: int) -> torch.Tensor:
        """Within a manually partitioned region: each device's part, along a dim, of the sum of all tensors along an axis."""
        parts = self.shape.size(axis)
        return (
            self._xla._XLAC._xla_spmd_reduce_scatter(
                "sum", tensor, 1.0, dim, parts, self.shape.groups(axis)
            )
            if parts > 1
            else tensor
        )

    def run(self) -> None:
        """Compute everything that was traced so far and not run yet, in one program."""
        self._xla.sync()
