"""Collectives with gradients, within a manually partitioned region: each device computes on its own part, and only what is asked for crosses.

GSPMD puts collectives where it finds them convenient: five all-reduces a layer going back where two are needed, and one over "data" in each micro-step. So a training step is one manually
partitioned region. The pairs below are those of Shoeybi et al., "Megatron-LM" (2019), section 3, and Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (2022), section 4.2.2, for sequence parallelism.
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
    """Into what is split over "model": the residual stream as it is, or put together along the sequence. Going back, gradients are summed."""

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
            summed = (
                ctx.mesh.reduce_scatter(gradient, MODEL, _SEQUENCE)
                if ctx.along_sequence
                else ctx.mesh.all_reduce(gradient, MODEL)
            )
        return summed, None, None, None


class _Left(torch.autograd.Function):
    """Out of what is split over "model": partial sums are summed, and with sequence parallelism each device keeps its part of the sequence."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mesh: DeviceMesh, along_sequence: bool, name: str
    ) -> torch.Tensor:
        ctx.mesh, ctx.along_sequence, ctx.name = mesh, along_sequence, name
        return leave_forward(x, mesh, along_sequence=along_sequence)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        with scope(f"{ctx.name}{BACKWARD}"):
            return (
                leave_backward(gradients[0], ctx.mesh, along_sequence=ctx.along_sequence),
                None,
                None,
                None,
            )


def enter(x: torch.Tensor, mesh: DeviceMesh, *, along_sequence: bool, name: str) -> torch.Tensor:
    """`[B, S, E]`, or `[B, S / model, E]` along the sequence, -> `[B, S, E]`, of which each device makes its own part."""
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
