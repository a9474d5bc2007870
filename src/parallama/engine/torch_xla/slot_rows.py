"""Some rows of tensors that have a row for every slot: the first ones, or one on each data shard.

Shapes: `B` slots, `R` rows of a step, `P` data shards of the mesh. Slots and rows are split over
the shards: the step's rows are the first `R / P` slots of each.
"""

from __future__ import annotations

import torch

from ..steps import STATE_AXES
from .mesh import DeviceMesh


def first_rows(mesh: DeviceMesh, name: str, whole: torch.Tensor, rows: int) -> torch.Tensor:
    """The step's rows of a tensor `[B, ...]`.

    Args:
        name: of the tensor, in `STATE_AXES`.
        rows: `R`.
    """
    axes = STATE_AXES[name]
    part = mesh.enter_manual(whole, axes)[: rows // mesh.shape.data]
    return mesh.leave_manual(part, axes, (rows, *whole.shape[1:]))


def with_first_rows(
    mesh: DeviceMesh, name: str, whole: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """A tensor `[B, ...]` with the step's rows, `[R, ...]`, in place of its own."""
    axes = STATE_AXES[name]
    own, ours = mesh.enter_manual(whole, axes), mesh.enter_manual(new, axes)
    joined = torch.cat([ours, own[ours.shape[0] :]])
    return mesh.leave_manual(joined, axes, whole.shape)


def picked(mesh: DeviceMesh, name: str, whole: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """The row of one slot of each shard, `[P, ...]`, of a tensor `[B, ...]`.

    Args:
        slot: `[P]` int32, its number on its shard.
    """
    axes = STATE_AXES[name]
    own = mesh.enter_manual(whole, axes)
    here = _here(mesh, own, slot)
    zero = torch.zeros((), dtype=own.dtype, device=own.device)
    rows = torch.where(here, own, zero)
    row = rows.any(0, keepdim=True) if own.dtype == torch.bool else rows.sum(0, keepdim=True)
    return mesh.leave_manual(row.to(own.dtype), axes, (mesh.shape.data, *whole.shape[1:]))


def placed(
    mesh: DeviceMesh,
    name: str,
    whole: torch.Tensor,
    new: torch.Tensor,
    slot: torch.Tensor,
    taken: torch.Tensor | None = None,
) -> torch.Tensor:
    """A tensor `[B, ...]` with a new row, `[P, ...]`, in one slot of each shard.

    Args:
        slot: `[P]` int32, its number on its shard.
        taken: `[P]` bool, whether the shard takes its new row; all do if None.
    """
    axes = STATE_AXES[name]
    own, row = mesh.enter_manual(whole, axes), mesh.enter_manual(new, axes)
    here = _here(mesh, own, slot)
    if taken is not None:
        flag = mesh.enter_manual(taken, STATE_AXES["slot"])
        here = here & flag.reshape(1, *(1,) * (own.dim() - 1))
    return mesh.leave_manual(torch.where(here, row, own), axes, whole.shape)


def _here(mesh: DeviceMesh, own: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Which of a device's own rows is the slot's, `[B / P, 1 ...]`."""
    number = mesh.enter_manual(slot, STATE_AXES["slot"])
    rows = torch.arange(own.shape[0], device=own.device, dtype=torch.int32)
    return (rows == number).reshape(-1, *(1,) * (own.dim() - 1))
