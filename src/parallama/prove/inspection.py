"""What was measured of a sharded model on its devices: each tensor's parts, held against the plan.
Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..plan.layer_patterns import ranges, without_layer
from ..plan.mesh_shape import MeshShape
from ..plan.placement import Axes

Span = tuple[int, int]
"""Of a dim: the first element, and one past the last."""
Slices = tuple[Span, ...]
"""A part of a tensor: a span of every dim."""


@dataclass(frozen=True, kw_only=True)
class MeasuredTensor:
    """One tensor on the devices.

    Attributes:
        name: of the parameter, or `cache.key.L`, `cache.value.L`.
        shape: over all devices.
        source_shape: in the checkpoint; of a cache, with the checkpoint's KV heads.
        axes: the plan's, one a dim.
        parts: the slices that each device holds.
        bytes_per_device: by device.
        wrong: how it is placed otherwise than planned, in words; None if it is not.
    """

    name: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    axes: Axes
    parts: tuple[Slices, ...]
    bytes_per_device: tuple[int, ...]
    wrong: str | None

    @property
    def local_shape(self) -> tuple[int, ...] | None:
        """The shape of each device's part; None where they differ."""
        shapes = {tuple(last - first for first, last in part) for part in self.parts}
        return shapes.pop() if len(shapes) == 1 else None

    @property
    def is_cache(self) -> bool:
        return self.name.startswith("cache.")

    def to_dict(self) -> dict[str, Any]:
        """An entry of `tensors` in the document of `--json`."""
        return {
            "name": self.name,
            "shape": self.shape,
            "local_shape": self.local_shape,
            "bytes_per_device": self.bytes_per_device,
            "partition": self.axes,
            "as_planned": self.wrong is None,
            "parts": [{"device": device, "slices": part} for device, part in enumerate(self.parts)],
        }


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors of several layers that are placed in the same way.

    Attributes:
        name: with `*` for the layer; where not all layers are in the group, with their numbers, as
            `0,2-5`.
        count: how many there are.
        first: the first of them.
    """

    name: str
    count: int
    first: MeasuredTensor

    @property
    def title(self) -> str:
        return self.name.removeprefix("model.") + (f" x{self.count}" if self.count > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A sharded model as it is on the devices.

    Attributes:
        device_names: what the runtime calls the devices.
        batch, positions: of the KV cache that was put on the devices for this.
        tensors: parameters in the model's order, then the cache.
    """

    model: str
    backend: str
    mesh: dict[str, int]
    dtype: str
    device_names: tuple[str, ...]
    batch: int
    positions: int
    tensors: tuple[MeasuredTensor, ...]

    @property
    def findings(self) -> tuple[str, ...]:
        """What is placed otherwise than planned, a sentence for each group."""
        return tuple(
            f"{group.title}: {group.first.wrong}"
            for group in grouped(self.tensors)
            if group.first.wrong is not None
        )

    def bytes_on(self, device: int, *, cached: bool) -> int:
        """Bytes that a device holds of the cache, or of the parameters."""
        return sum(
            tensor.bytes_per_device[device] for tensor in self.tensors if tensor.is_cache == cached
        )

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`, without what its other options add."""
        shape = MeshShape(self.mesh)
        return {
            "model": self.model,
            "backend": self.backend,
            "mesh": self.mesh,
            "dtype": self.dtype,
            "batch": self.batch,
            "cache_positions": self.positions,
            "devices": [
                {
                    "id": device,
                    "name": name,
                    "coordinates": shape.coordinates(device),
                    "param_bytes": self.bytes_on(device, cached=False),
                    "kv_bytes": self.bytes_on(device, cached=True),
                }
                for device, name in enumerate(self.device_names)
            ],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }


def shown_slices(slices: Slices) -> str:
    """`[0:48, 0:32]`."""
    return f"[{', '.join(f'{first}:{last}' for first, last in slices)}]"


def grouped(tensors: Sequence[MeasuredTensor]) -> tuple[TensorGroup, ...]:
    """Tensors grouped over the layers, in their order.

    Layers whose tensors are placed differently are in groups of their own, one after another.
    """
    by_name: dict[str, dict[tuple[object, ...], list[tuple[int | None, MeasuredTensor]]]] = {}
    for tensor in tensors:
        name, layer = _without_layer(tensor.name)
        how = (tensor.shape, tensor.parts, tensor.bytes_per_device, tensor.axes, tensor.wrong)
        by_name.setdefault(name, {}).setdefault(how, []).append((layer, tensor))
    found = []
    for name, groups in by_name.items():
        for members in groups.values():
            layers = [layer for layer, _ in members if layer is not None]
            title = name if len(groups) == 1 else name.replace("*", ranges(layers))
            found.append(TensorGroup(name=title, count=len(members), first=members[0][1]))
    return tuple(found)


def _without_layer(name: str) -> tuple[str, int | None]:
    """A name with `*` for the layer, and the layer."""
    if name.startswith("cache."):
        kind, _, layer = name.rpartition(".")
        return f"{kind}.*", int(layer)
    return without_layer(name)
