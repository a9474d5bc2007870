"""AdamW and SGD, on each device's own part. Each parameter's update is one fused loop."""

from __future__ import annotations

import math

import torch

from ...engine.torch_xla.ordering import barrier_all
from ...plan.placement import Placement
from ..options import StepOptions


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
    """One parameter's update, as `torch.optim.AdamW` and `torch.optim.SGD` do it.

    Args:
        kept: what the optimizer keeps of it, as `options.slots` names it.
        lr: `[1]` fp32.
        step: `[1]` fp32, the number of this step, from 1.
        finite: `[1]` bool; where it is false everything stays as it was.

    Returns:
        The new parameter, and what is kept of it.
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
    updated = shrunk - (lr / _correction(beta1, step)) * (mean / denominator)
    return torch.where(finite, updated, parameter), mean, square


def _settled(*kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is kept, done before the parameter is.

    XLA would compute it a second time from the old buffers for the parameter, and copy them first.
    """
    return barrier_all(*kept)


def _correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """`1 - beta^step`, with all its digits where beta is near 1."""
    return -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)
