"""From summed gradients to new parameters, on each device's own part: what is summed over devices, the global norm, AdamW and SGD.

Gradients come in as sums over a device's own micro-steps; each is summed over "data" once. Then they are made true to the checkpoint: what holds nothing of it (zero heads) gets no
gradient, and copies of a KV head get the sum of all copies' gradients, so that they stay equal.

Each parameter's update is one fused loop in the program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .. import heads
from ..mesh import DeviceMesh
from ..plan import Blocks, Placement
from ..topology import AXES, DATA, MODEL
from .layout import TrainingPlan
from .options import StepOptions


def partial_over_model(plan: TrainingPlan, placement: Placement, *, sequence_parallel: bool) -> bool:
    """Whether each device along "model" has only a part of a gradient that is to be whole there: of a parameter that is not split over "model", but used on what is."""
    if plan.mesh.model == 1 or MODEL in placement.axes:
        return False
    if placement.name in plan.adapters:
        base = placement.name.removesuffix(".weight").rpartition(".")[0]
        return MODEL in plan[f"{base}.weight"].axes
    module = placement.name.rpartition(".")[0]
    if module.endswith(("q_norm", "k_norm")):
        return plan.split(module.rpartition(".")[0])
    return len(placement.shape) == 1 and sequence_parallel


class Reduction:
    """Sums of gradients over devices.

    Args:
        index: by parameter name, `[n]` int64, of the blocks of its laid-out dim that lie on the device which of the checkpoint's each is: see `laid_out`.
    """

    def __init__(self, plan: TrainingPlan, mesh: DeviceMesh, options: StepOptions, index: Mapping[str, torch.Tensor]) -> None:
        self._plan, self._mesh, self._index = plan, mesh, index
        self._sequence_parallel = options.sequence_parallel

    def __call__(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each device's part of every gradient, of the sum over all devices, in the plan's order."""
        plan = self._plan
        found = {placement.name: sums[placement.name] for placement in plan.trained}
        small = [
            placement.name
            for placement in plan.trained
            if len(placement.shape) == 1 or (placement.name in plan.adapters and DATA not in placement.axes)
        ]
        for placement in plan.trained:
            if DATA in placement.axes:
                found[placement.name] = self._mesh.reduce_scatter(found[placement.name], DATA, placement.axes.index(DATA))
            elif placement.name not in small:
                found[placement.name] = self._mesh.all_reduce(found[placement.name], DATA)
        self._together(found, small, DATA)
        partial = [each.name for each in plan.trained if partial_over_model(plan, each, sequence_parallel=self._sequence_parallel)]
        self._together(found, partial, MODEL)
        self._true_to_the_checkpoint(found)
        return found

    def _together(self, found: dict[str, torch.Tensor], names: list[str], axis: str) -> None:
        """Sum small gradients in one collective."""
        if not names or self._mesh.shape.size(axis) == 1:
            return
        flat = self._mesh.all_reduce(torch.cat([found[name].flatten() for name in names]), axis)
        for name, part in zip(names, flat.split([found[name].numel() for name in names]), strict=True):
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
            if repeated(blocks):
                # `[sources, block, ...]`: the sum of the device's copies of each.
                copied[name] = torch.stack(
                    [
                        torch.where(self._holds(name, source, parts), parts, torch.zeros((), device=parts.device)).sum(0)
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
        self, gradients: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor], ranks: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """`[1]` fp32, a device's share of the squared global norm, each number of the checkpoint's counted once.

        Args:
            first: by parameter name, `[n]` bool, which of the device's blocks are the first of their source.
            ranks: by mesh axis `[1]` int64, the device's place along it.
        """
        shares: dict[tuple[str, ...], list[torch.Tensor]] = {}
        for name, gradient in gradients.items():
            blocks, squares = self._plan.blocks(name), gradient.square()
            if blocks is not None and repeated(blocks):
                counted = first[name].reshape(*(1,) * blocks.dim, -1, 1, *(1,) * (gradient.dim() - blocks.dim - 1))
                squares = torch.where(counted, squares.unflatten(blocks.dim, (-1, blocks.block)), torch.zeros((), device=squares.device))
            whole = tuple(axis for axis in AXES if axis not in self._plan[name].axes and self._mesh.shape.size(axis) > 1)
            shares.setdefault(whole, []).append(squares.sum())
        total = torch.zeros(1, device=next(iter(gradients.values())).device)
        for whole, squares_of in shares.items():
            share = torch.stack(squares_of).sum()[None]
            for axis in whole:
                share = torch.where(ranks[axis] == 0, share, torch.zeros_like(share))
            total = total + share
        return total


def repeated(blocks: Blocks) -> bool:
    """Whether something of the checkpoint stands in several places."""
    held = [source for source in blocks.sources if source != heads.EMPTY]
    return len(held) != len(set(held))


def slots(options: StepOptions) -> tuple[str, ...]:
    """What an optimizer keeps of each parameter, as prefixes of names in the state."""
    if options.optimizer == "adamw":
        return ("adam.m", "adam.v")
    return ("sgd.momentum",) if options.momentum else ()


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
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One parameter's update, as `torch.optim.AdamW` and `torch.optim.SGD` do it.

    Args:
        kept: what `slots` names.
        lr: `[1]` fp32.
        step: `[1]` fp32, the number of this step, from 1.
    """
    decay = options.weight_decay if decayed(placement) else 0.0
    if options.optimizer == "sgd":
        gradient = gradient + decay * parameter if decay else gradient
        if not kept:
            return parameter - lr * gradient, ()
        # torch begins with the gradient itself, and so does a momentum of zeros.
        momentum = options.momentum * kept[0] + gradient
        return parameter - lr * momentum, (momentum,)
    beta1, beta2 = options.betas
    mean, square = kept
    if decay:
        parameter = parameter * (1 - lr * decay)
    mean = mean + (gradient - mean) * (1 - beta1)
    square = square * beta2 + gradient * gradient * (1 - beta2)
    denominator = square.sqrt() / _correction(beta2, step).sqrt() + options.eps
    return parameter - (lr / _correction(beta1, step)) * (mean / denominator), (mean, square)


def _correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """`1 - beta^step`, with all its digits where beta is near 1."""
    return -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)
