"""Collectives with gradients, within a manually partitioned region.

There each device computes on its own part, and only what is asked for is transferred. GSPMD would
put collectives where it finds them convenient: five all-reduces a layer in the backward pass, where
two are needed, and one over "data" in each micro-step.

The pairs below are those of Shoeybi et al., "Megatron-LM" (2019), section 3. For sequence
parallelism they are those of Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (2022), section 4.2.2.
"""

from __future__ import annotations

from typing import Any

import torch

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.scopes import scope
from ...plan.mesh_shape import MODEL
from ...plan.train_collectives import BACKWARD

_SEQUENCE = 1


class _Entered(torch.autograd.Function):
    """Forward: the residual stream as it is, or all-gathered along the sequence.

    Backward: gradients are summed over "model".
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mesh: DeviceMesh, along_sequence: bool, name: str
    ) -> torch.Tensor:
        ctx.mesh, ctx.along_sequence, ctx.name = mesh, along_sequence, name
        return mesh.all_gather(x, MODEL, _SEQUENCE) if along_sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        with scope(f"{ctx.name}{BACKWARD}"):
            summed = leave_forward(gradient, ctx.mesh, along_sequence=ctx.along_sequence)
        return summed, None, None, None


class _Left(torch.autograd.Function):
    """Forward: partial sums are summed over "model".

    With sequence parallelism each device keeps its part of the sequence.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mesh: DeviceMesh, along_sequence: bool, name: str
    ) -> torch.Tensor:
        ctx.mesh, ctx.along_sequence, ctx.name = mesh, along_sequence, name
        return leave_forward(x, mesh, along_sequence=along_sequence)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        with scope(f"{ctx.name}{BACKWARD}"):
            own = leave_backward(gradient, ctx.mesh, along_sequence=ctx.along_sequence)
        return own, None, None, None


def enter(x: torch.Tensor, mesh: DeviceMesh, *, along_sequence: bool, name: str) -> torch.Tensor:
    """What a module that is split over "model" takes in.

    Args:
        x: `[B, S, E]`, or `[B, S / model, E]` along the sequence.
        name: of the module, for the collective's scope.

    Returns:
        `[B, S, E]`, from which each device computes its own part.
    """
    return _Entered.apply(x, mesh, along_sequence, name)


def leave(x: torch.Tensor, mesh: DeviceMesh, *, along_sequence: bool, name: str) -> torch.Tensor:
    """Partial sums `[B, S, E]` -> their sum, `[B, S, E]` or `[B, S / model, E]`."""
    return _Left.apply(x, mesh, along_sequence, name)


def leave_forward(x: torch.Tensor, mesh: DeviceMesh, *, along_sequence: bool) -> torch.Tensor:
    """`leave`, without gradients."""
    return mesh.reduce_scatter(x, MODEL, _SEQUENCE) if along_sequence else mesh.all_reduce(x, MODEL)


def leave_backward(
    gradient: torch.Tensor, mesh: DeviceMesh, *, along_sequence: bool
) -> torch.Tensor:
    """The gradient of each device's partial sums, from that of their sum."""
    return mesh.all_gather(gradient, MODEL, _SEQUENCE) if along_sequence else gradient
