"""Snapshots of known content, without devices."""

from __future__ import annotations

from typing import Any

import torch

from parallama.plan import heads
from parallama.plan.mesh_shape import MeshShape
from parallama.plan.placement import Blocks
from parallama.train.checkpoints import Snapshot
from parallama.train.manifest import BlockRuns, Manifest, TensorEntry

BLOCKS = Blocks(dim=0, block=2, sources=(0, heads.EMPTY, 0, 1, heads.EMPTY, heads.EMPTY, 2, 3))
"""Four blocks of two rows over eight places: one stands twice, three places are empty."""


def state(step: int) -> dict[str, torch.Tensor]:
    """A model's own tensors after a step."""
    generator = torch.Generator().manual_seed(step)
    made = {
        "param.heads.weight": torch.randn(8, 16, generator=generator),
        "adam.m.norm.weight": torch.randn(5, generator=generator),
        "adam.v.split.weight": torch.randn(4, 16, generator=generator).to(torch.bfloat16),
    }
    return made | {"step": torch.tensor([float(step)])}


LAYOUTS: dict[str, tuple[tuple[str | None, ...], Blocks | None]] = {
    "param.heads.weight": (("model", "data"), BLOCKS),
    "adam.m.norm.weight": ((None,), None),
    "adam.v.split.weight": ((None, "model"), None),
    "step": ((None,), None),
}


def laid_out(tensor: torch.Tensor, blocks: Blocks | None) -> torch.Tensor:
    if blocks is None:
        return tensor
    pieces = [
        torch.zeros(blocks.block, *tensor.shape[1:])
        if source == heads.EMPTY
        else tensor[source * blocks.block : (source + 1) * blocks.block]
        for source in blocks.sources
    ]
    return torch.cat(pieces)


def snapshot(step: int, mesh: MeshShape | None = None) -> Snapshot:
    """As `checkpoints.take` makes it."""
    mesh = mesh or MeshShape(data=2, model=4)
    entries: dict[str, TensorEntry] = {}
    parts: dict[int, dict[str, torch.Tensor]] = {device: {} for device in range(mesh.devices)}
    for name, tensor in state(step).items():
        axes, blocks = LAYOUTS[name]
        whole = laid_out(tensor, blocks)
        entry = entries[name] = TensorEntry(
            dtype=str(whole.dtype).removeprefix("torch."),
            shape=list(whole.shape),
            axes=list(axes),  # type: ignore[arg-type]
            blocks=BlockRuns.of(blocks) if blocks is not None else None,
        )
        for device in entry.holders(mesh):
            parts[device][name] = whole[entry.part(mesh, device)].contiguous()
    about: dict[str, Any] = {
        "mesh": {"data": mesh.data, "model": mesh.model},
        "data": {"epoch": 0, "row": step, "fingerprint": "f"},
        "rng": {"seed": 0, "step": step},
    }
    manifest = Manifest(
        step=step,
        tokens=7,
        tensors=entries,
        files={},
        schedule={},
        settings={},
        plan={},
        versions={},
        **about,
    )
    return Snapshot(
        manifest=manifest, parts={device: held for device, held in parts.items() if held}
    )
