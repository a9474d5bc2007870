"""A model's parameters on the devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..engine.interface import DeviceTensor, Engine
from ..errors import CheckpointError, lines
from ..plan.placement import Plan
from . import repeats
from .layout import Layout, cut, take_off


@dataclass(frozen=True, kw_only=True)
class DeviceWeights:
    """A model's parameters on the devices.

    Attributes:
        tensors: by parameter name.
    """

    plan: Plan
    mesh: Engine
    tensors: dict[str, torch.Tensor]

    def fetch(self, name: str) -> torch.Tensor:
        """A parameter on the host, as in the checkpoint."""
        return take_off(
            repeats.fetch(self.mesh, lambda: self.tensors[name], self.plan[name].axes),
            self.plan,
            name,
        ).contiguous()

    def bytes_per_device(self) -> list[int]:
        """Measured from the shards that lie on the devices, not from the plan."""
        return bytes_per_device(self.mesh, self.tensors)


def bytes_per_device(mesh: Engine, tensors: Mapping[str, DeviceTensor]) -> list[int]:
    """Bytes of some tensors on each device, measured from their shards."""
    sizes = (mesh.local_bytes(tensor) for tensor in tensors.values())
    return [sum(each) for each in zip([0] * mesh.shape.devices, *sizes, strict=True)]


def put_parameter(
    source: torch.Tensor, plan: Plan, mesh: Engine, name: str, dtype: torch.dtype
) -> torch.Tensor:
    """Move one parameter to the devices, laid out, cast and split.

    Raises:
        CheckpointError: the source has not the shape that the plan expects.
    """
    placement = plan[name]
    if tuple(source.shape) != placement.source_shape:
        raise CheckpointError(
            lines(
                f"tensor {name} has shape {list(source.shape)}",
                f"expected {list(placement.source_shape)}, from the config",
            )
        )

    layout = Layout.of(plan, name)

    def part(device: int) -> torch.Tensor:
        local = cut(source.__getitem__, layout, device, dtype).contiguous()
        return local.clone() if local.data_ptr() == source.data_ptr() else local

    return mesh.put_shards(part, placement.axes)
