"""Gradients summed over devices, and their global norm, on each device's own part.

They come in as sums over a device's own micro-steps, and each is summed over "data" once. Then they
are made true to the checkpoint: zero heads, which stand for nothing of it, get no gradient; copies
of a KV head get the sum of all copies' gradients, so that they stay equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.scopes import scope
from ...plan import heads
from ...plan.mesh_shape import DATA, MODEL
from ...plan.placement import Blocks
from ...plan.train_collectives import (
    GRADIENT,
    TOGETHER,
    has_repeats,
    partial_over_model,
    summed_together,
)
from ..layout import TrainingPlan
from ..options import StepOptions


class Reduction:
    """Sums of gradients over devices.

    Args:
        index: by parameter name, `[n]` int64: for each block of the placed dim on this device, the
            checkpoint's block that it is, or `EMPTY`.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        mesh: DeviceMesh,
        options: StepOptions,
        index: Mapping[str, torch.Tensor],
    ) -> None:
        self._plan, self._mesh, self._index = plan, mesh, index
        self._sequence_parallel = options.sequence_parallel

    def __call__(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each device's part of every gradient's sum over all devices, in the plan's order."""
        plan, mesh = self._plan, self._mesh
        found = {placement.name: sums[placement.name] for placement in plan.trained}
        small = [placement.name for placement in plan.trained if summed_together(placement)]
        for placement in plan.trained:
            name, axes = placement.name, placement.axes
            with scope(f"{name}{GRADIENT}"):
                if DATA in axes:
                    found[name] = mesh.reduce_scatter(found[name], DATA, axes.index(DATA))
                elif not summed_together(placement):
                    found[name] = mesh.all_reduce(found[name], DATA)
        self._sum_together(found, small, DATA)
        partial = [
            each.name
            for each in plan.trained
            if partial_over_model(plan, each, sequence_parallel=self._sequence_parallel)
        ]
        self._sum_together(found, partial, MODEL)
        self._make_true_to_checkpoint(found)
        return found

    def _sum_together(self, found: dict[str, torch.Tensor], names: list[str], axis: str) -> None:
        """Sum small gradients in one collective."""
        if not names or self._mesh.shape.size(axis) == 1:
            return
        with scope(TOGETHER):
            flat = self._mesh.all_reduce(torch.cat([found[name].flatten() for name in names]), axis)
        parts = flat.split([found[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            found[name] = part.reshape(found[name].shape)

    def _make_true_to_checkpoint(self, found: dict[str, torch.Tensor]) -> None:
        """No gradient for zero heads, and one sum for all copies of a head."""
        copied: dict[str, tuple[Blocks, torch.Tensor]] = {}
        for placement in self._plan.trained:
            name, blocks = placement.name, self._plan.blocks(placement.name)
            if blocks is None or blocks.heads is None:
                continue
            parts = found[name].unflatten(blocks.dim, (-1, blocks.block)).movedim(blocks.dim, 0)
            nothing = torch.zeros((), device=parts.device)
            if heads.EMPTY in blocks.sources:
                empty = self._holds(name, heads.EMPTY, parts)
                parts = torch.where(empty, nothing, parts)
                found[name] = _placed(parts, blocks)
            if has_repeats(self._plan, placement):
                # `[sources, block, ...]`: the sum of the device's copies of each.
                of_each = [
                    torch.where(self._holds(name, source, parts), parts, nothing).sum(0)
                    for source in range(max(blocks.sources) + 1)
                ]
                copied[name] = blocks, torch.stack(of_each)
        over_devices = {name: sums for name, (_, sums) in copied.items()}
        split = [name for name in copied if MODEL in self._plan[name].axes]
        self._sum_together(over_devices, split, MODEL)
        for name, (blocks, _) in copied.items():
            sums = over_devices[name]
            parts = torch.zeros((), device=sums.device)
            for source in range(sums.shape[0]):
                parts = torch.where(self._holds(name, source, sums), sums[source][None], parts)
            found[name] = _placed(parts, blocks)

    def _holds(self, name: str, source: int, like: torch.Tensor) -> torch.Tensor:
        """`[n, 1, ...]`: which of the device's blocks are a block of the checkpoint's."""
        return (self._index[name] == source).reshape(-1, *(1,) * (like.dim() - 1))

    def square_norm(
        self,
        gradients: Mapping[str, torch.Tensor],
        first: Mapping[str, torch.Tensor],
        ranks: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """A device's share of the squared global norm, `[1]` fp32.

        Over all devices, each of the checkpoint's numbers is counted once.

        Args:
            first: by parameter name, `[n]` bool, which of the device's blocks are the first of
                their source.
            ranks: by mesh axis `[1]` int64, the device's place along it.
        """
        shares: dict[tuple[str, ...], list[torch.Tensor]] = {}
        for name, gradient in gradients.items():
            placement, blocks, squares = (
                self._plan[name],
                self._plan.blocks(name),
                gradient.square(),
            )
            if blocks is not None and has_repeats(self._plan, placement):
                behind = gradient.dim() - blocks.dim - 1
                squares = torch.where(
                    first[name].reshape(*(1,) * blocks.dim, -1, 1, *(1,) * behind),
                    squares.unflatten(blocks.dim, (-1, blocks.block)),
                    torch.zeros((), device=squares.device),
                )
            replicated = tuple(
                axis
                for axis, size in self._mesh.shape.items()
                if axis not in placement.axes and size > 1
            )
            shares.setdefault(replicated, []).append(squares.sum())
        total = torch.zeros(1, device=next(iter(gradients.values())).device)
        for replicated, squares_of in shares.items():
            share = torch.stack(squares_of).sum()[None]
            for axis in replicated:
                share = torch.where(ranks[axis] == 0, share, torch.zeros_like(share))
            total = total + share
        return total


def _placed(parts: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Blocks `[n, ..., block, ...]` as one dim again."""
    return parts.movedim(0, blocks.dim).flatten(blocks.dim, blocks.dim + 1)
