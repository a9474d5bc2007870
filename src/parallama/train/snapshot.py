"""A training state copied from the devices to the host, with what a checkpoint says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.interface import Engine
from ..plan.placement import Blocks
from .manifest import BlockRuns, Manifest, TensorEntry


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state on the host, ready to be written.

    Attributes:
        manifest: complete but for `files`.
        parts: for each device, by tensor name, what its file holds.
    """

    manifest: Manifest
    parts: dict[int, dict[str, torch.Tensor]]


def take(
    state: Mapping[str, torch.Tensor],
    layout: Callable[[str], tuple[tuple[str | None, ...], Blocks | None]],
    mesh: Engine,
    **about: Any,
) -> Snapshot:
    """Copy a state from the devices. Afterwards they may go on.

    Args:
        state: device tensors by name.
        layout: from a name to the mesh axis of every dim, and to the blocks of the placed dim.
        about: the manifest's other fields.
    """
    parts: dict[int, dict[str, torch.Tensor]] = {device: {} for device in range(mesh.shape.devices)}
    entries = {}
    for name, tensor in state.items():
        axes, blocks = layout(name)
        entry = TensorEntry(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            axes=list(axes),
            blocks=BlockRuns.of(blocks) if blocks is not None else None,
        )
        entries[name] = entry
        shards = mesh.shards(tensor)
        for device in entry.holders(mesh.shape):
            parts[device][name] = shards[device].contiguous()
    manifest = Manifest(tensors=entries, files={}, mesh=mesh.shape, **about)
    return Snapshot(
        manifest=manifest, parts={device: held for device, held in parts.items() if held}
    )
