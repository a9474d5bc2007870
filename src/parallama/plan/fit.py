"""Whether a request fits a hardware's memory, and the largest one that does. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .hardware import Hardware
from .placement import Plan
from .request import Request
from .train_cost import train_memory


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a request fits a hardware's devices.

    Attributes:
        fits: with --train, whether the training step does.
        needed_bytes: on each device.
        largest_batch: at the given context; 0 if no batch fits.
        largest_context: at the given batch, up to the model's maximum; 0 if none fits. In
            training the rows' length.
    """

    fits: bool
    needed_bytes: int
    largest_batch: int
    largest_context: int


def needed_bytes(plan: Plan, training_plan: Plan, request: Request) -> int:
    """What a request takes on each device; its training step if it has one."""
    if request.train is None:
        return request.memory(plan).total
    step = request.train_step()
    return train_memory(training_plan, step, optimizer_slots=request.optimizer_slots).total


def fit(plan: Plan, training_plan: Plan, request: Request, hardware: Hardware) -> Fit:
    """Hold what a request needs against a hardware's memory.

    Args:
        training_plan: of the training step, if the request has one.
    """

    def fits(changed: Request) -> bool:
        return needed_bytes(plan, training_plan, changed) <= hardware.memory_bytes

    def at_context(length: int) -> Request:
        if request.train is not None:
            return replace(request, seq=length)
        return replace(request, max_model_len=length, seq=min(request.seq, length))

    return Fit(
        fits=fits(request),
        needed_bytes=needed_bytes(plan, training_plan, request),
        largest_batch=largest(lambda batch: fits(replace(request, batch=batch))),
        largest_context=largest(lambda length: fits(at_context(length)), plan.model.max_positions),
    )


def largest(fits: Callable[[int], bool], most: int | None = None) -> int:
    """The largest number from 1 (up to `most`) that fits; 0 if none does.

    Args:
        fits: holds for every number below one for which it holds, and without `most` not for all.
    """
    if not fits(1):
        return 0
    if most is not None and fits(most):
        return most
    good, bad = 1, 2
    while (most is None or bad < most) and fits(bad):
        good, bad = bad, bad * 2
    bad = bad if most is None else min(bad, most)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
