"""From summed gradients to new parameters, on each device's own part: what is summed over devices, the global norm, AdamW and SGD.

Gradients come in as sums over a device's own micro-steps; each is summed over "data" once. Then they are made true to the checkpoint: what holds nothing of it (zero heads) gets no
gradient, and copies of a KV head get the sum of all copies' gradients, so that they stay equal.

Each parameter's update is one fused loop in the program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.ordering import barrier_all
from ...engine.torch_xla.scopes import scope
from ...plan import heads
from ...plan.mesh_shape import DATA, MODEL
from ...plan.placement import Placement
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
        index: by parameter name, `[n]` int64, of the blocks of its laid-out dim that lie on the device which of the checkpoint's each is: see `laid_out`.
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
        """Each device's part of every gradient, of the sum over all devices, in the plan's order."""
        plan = self._plan
        found = {placement.name: sums[placement.name] for placement in plan.trained}
        small = [placement.name for placement in plan.trained if summed_together(placement)]
        for placement in plan.trained:
            with scope(f"{placement.name}{GRADIENT}"):
                if DATA in placement.axes:
                    found[placement.name] = self._mesh.reduce_scatter(
                        found[placement.name], DATA, placement.axes.index(DATA)
                    )
                elif not summed_together(placement):
                    found[placement.name] = self._mesh.all_reduce(found[placement.name], DATA)
        self._together(found, small, DATA)
        partial = [
            each.name
            for each in plan.trained
            if partial_over_model(plan, each, sequence_parallel=self._sequence_parallel)
        ]
        self._together(found, partial, MODEL)
        self._true_to_the_checkpoint(found)
        return found

    def _together(self, found: dict[str, torch.Tensor], names: list[str], axis: str) -> None:
        """Sum small gradients in one collective."""
        if not names or self._mesh.shape.size(axis) == 1:
            return
        with scope(TOGETHER):
            flat = self._mesh.all_reduce(torch.cat([found[name].flatten() for name in names]), axis)
        for name, part in zip(
            names, flat.split([found[name].numel() for name in names]), strict=True
        ):
            found[name] = part.reshape(found[name].shape)

    def _true_to_the_checkpoint(self, found: dict[str, torch.Tensor]) -> None:
        copied: dict[str, torch.Tensor] = {}
        for placement in self._plan.trained:
            blocks = self._plan.blocks(placement.name)
            if blocks is None or blocks.heads is None:
                continue
            name = placement.name
            parts = found[name].unflatten(blocks.dim, (-1, blocks.block)).movedim(blocks.dim, 0)
            if heads.EMPTY in blocks.sources:
                real = (self._index[name] != heads.EMPTY).reshape(-1, *(1,) * (parts.dim() - 1))
                parts = torch.where(real, parts, torch.zeros((), device=parts.device))
                found[name] = parts.movedim(0, blocks.dim).flatten(blocks.dim, blocks.dim + 1)
            if has_repeats(self._plan, placement):
                # `[sources, block, ...]`: the sum of the device's copies of each.
                copied[name] = torch.stack(
                    [
                        torch.where(
                            self._holds(name, source, parts),
                            parts,
                            torch.zeros((), device=parts.device),
                        ).sum(0)
                        for source in range(max(blocks.sources) + 1)
                    ]
                )
        split = [name for name in copied if MODEL in self._plan[name].axes]
        self._together(copied, split, MODEL)
        for name, sums in copied.items():
            blocks = self._plan.blocks(name)
            assert blocks is not None
            parts = torch.zeros((), device=sums.device)
            for source in range(sums.shape[0]):
                parts = torch.where(self._holds(name, source, sums), sums[source][None], parts)
            found[name] = parts.movedim(0, blocks.dim).flatten(blocks.dim, blocks.dim + 1)

    def _holds(self, name: str, source: int, like: torch.Tensor) -> torch.Tensor:
        return (self._index[name] == source).reshape(-1, *(1,) * (like.dim() - 1))

    def square_norm(
        self,
        gradients: Mapping[str, torch.Tensor],
        first: Mapping[str, torch.Tensor],
        ranks: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """`[1]` fp32, a device's share of the squared global norm, each number of the checkpoint's counted once.

        Args:
            first: by parameter name, `[n]` bool, which of the device's blocks are the first of their source.
            ranks: by mesh axis `[1]` int64, the device's place along it.
        """
        shares: dict[tuple[str, ...], list[torch.Tensor]] = {}
        for name, gradient in gradients.items():
            blocks, squares = self._plan.blocks(name), gradient.square()
            if blocks is not None and has_repeats(self._plan, self._plan[name]):
                counted = first[name].reshape(
                    *(1,) * blocks.dim, -1, 1, *(1,) * (gradient.dim() - blocks.dim - 1)
                )
                squares = torch.where(
                    counted,
                    squares.unflatten(blocks.dim, (-1, blocks.block)),
                    torch.zeros((), device=squares.device),
                )
            whole = tuple(
                axis
                for axis, size in self._mesh.shape.items()
                if axis not in self._plan[name].axes and size > 1
            )
            shares.setdefault(whole, []).append(squares.sum())
        total = torch.zeros(1, device=next(iter(gradients.values())).device)
        for whole, squares_of in shares.items():
            share = torch.stack(squares_of).sum()[None]
            for axis in whole:
                share = torch.where(ranks[axis] == 0, share, torch.zeros_like(share))
            total = total + share
        return total


def decayed(placement: Placement) -> bool:
    """Whether a parameter has weight decay: matrices do, norms and biases don't."""
    return len(placement.shape) > 1


def update(
    options: StepOptions,
    placement: Placement,
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    kept: tuple[torch.Tensor, ...],
    lr: torch.Tensor,
    step: torch.Tensor,
    finite: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """One parameter's update, as `torch.optim.AdamW` and `torch.optim.SGD` do it: the new parameter, and what is kept of it.

    Args:
        kept: what `options.slots` names.
        lr: `[1]` fp32.
        step: `[1]` fp32, the number of this step, from 1.
        finite: `[1]` bool; where it is false everything stays as it was.
    """
    decay = options.weight_decay if decayed(placement) else 0.0
    if options.optimizer == "sgd":
        change = gradient + decay * parameter if decay else gradient
        if not kept:
            return (torch.where(finite, parameter - lr * change, parameter),)
        # torch begins with the gradient itself, and so does a momentum of zeros.
        (momentum,) = _settled(torch.where(finite, options.momentum * kept[0] + change, kept[0]))
        return torch.where(finite, parameter - lr * momentum, parameter), momentum
    beta1, beta2 = options.betas
    mean, square = kept
    mean, square = _settled(
        torch.where(finite, mean + (gradient - mean) * (1 - beta1), mean),
        torch.where(finite, square * beta2 + gradient * gradient * (1 - beta2), square),
    )
    denominator = square.sqrt() / _correction(beta2, step).sqrt() + options.eps
    shrunk = parameter * (1 - lr * decay) if decay else parameter
    return (
        torch.where(
            finite, shrunk - (lr / _correction(beta1, step)) * (mean / denominator), parameter
        ),
        mean,
        square,
    )


def _settled(*kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is kept, done before the parameter is: XLA would compute it a second time from the old buffers for that, and copy them first to have them."""
    return barrier_all(*kept)


def _correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """`1 - beta^step`, with all its digits where beta is near 1."""
    return -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)
