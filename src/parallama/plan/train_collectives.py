"""Which collectives a training step needs, before anything is compiled. Pure.

A step is one manually partitioned region: its collectives are those that `passes` and `optimizer`
of `train.torch_xla` ask for, and these are the same in closed form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .collectives import Collective, grouped, one_collective
from .heads import EMPTY
from .layer_patterns import local_elements
from .mesh_shape import DATA, MODEL
from .placement import Placement, Plan
from .trainable import ADAPTER, LAYER_PARTS, check_trainable, trained_parameters

BACKWARD = " (backward)"
GRADIENT = " (gradient)"
TOGETHER = "gradients"
"""Belong to a module's backward pass, to a parameter's gradient, and to many small sums at once."""
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What of a training step decides about its collectives.

    Attributes:
        batch: sequences of a micro-step over all devices.
        seq: tokens of a sequence.
        micro_steps: of one optimizer step.
        rematerialized: layers that are computed again for the backward pass.
        sequence_parallel: norms and residuals are split over "model" along the sequence.
        itemsize: bytes of an activation.
        moved_itemsize: bytes of an activation or weight while it is transferred between devices,
            where the backend widens it; `itemsize` if None.
    """

    batch: int
    seq: int
    micro_steps: int = 1
    rematerialized: frozenset[int] = frozenset()
    sequence_parallel: bool = False
    itemsize: int = 4
    moved_itemsize: int | None = None

    @property
    def moved(self) -> int:
        return self.moved_itemsize or self.itemsize


def expected_in_training(plan: Plan, step: TrainStep) -> tuple[Collective, ...]:
    """What one optimizer step needs on a mesh, in the order of the model.

    Over "model" these are Megatron-LM's (Shoeybi et al., 2019). Weights that are split over "data"
    too are gathered for each pass, and their gradients are reduce-scattered (Rajbhandari et al.,
    "ZeRO", 2020). Every gradient is summed over "data" once, whatever the number of micro-steps.

    Raises:
        PlanError: training doesn't follow such a plan.
    """
    check_trainable(plan)
    counted: Counter[Collective] = Counter()
    for each in _MicroStep(plan, step).collectives():
        counted[each] += step.micro_steps
    for each in _reduction(plan, step.sequence_parallel):
        counted[each] += 1
    needed = Counter(
        {
            each: count
            for each, count in counted.items()
            if any(plan.mesh.size(axis) > 1 for axis in each.axis.split("+"))
        }
    )
    return grouped(needed, plan.model.layers)


class _MicroStep:
    """Forward and backward of one micro-step."""

    def __init__(self, plan: Plan, step: TrainStep) -> None:
        self._plan, self._step = plan, step
        self._sequence_parallel = step.sequence_parallel and plan.mesh.model > 1
        self._tokens = plan.local_rows(step.batch) * step.seq
        self._adapters = any(each.style == ADAPTER for each in plan.parameters)

    def collectives(self) -> Iterator[Collective]:
        plan = self._plan
        yield from self._weight("model.embed_tokens")
        if plan["model.embed_tokens.weight"].axes[0] == MODEL:
            yield self._summed("model.embed_tokens")
        reaches = not self._adapters  # something before the part has a gradient
        for layer in range(plan.model.layers):
            again = layer in self._step.rematerialized
            for part, firsts, last in LAYER_PARTS:
                name = f"model.layers.{layer}.{part}"
                trained = not self._adapters or any(
                    self._adapted(f"{name}.{each}") for each in (*firsts, last)
                )
                yield from self._forward(name, firsts, last)
                if again:
                    yield from self._forward(name, firsts, last, unused=part == "mlp")
                yield from self._backward(name, firsts, last, reaches=reaches, trained=trained)
                reaches = reaches or trained
        yield from self._head()

    def _head(self) -> Iterator[Collective]:
        plan = self._plan
        module = "model.embed_tokens" if plan.model.tied else "lm_head"
        yield from self._weight(module, label="lm_head")
        yield from self._weight(module, BACKWARD)
        if plan[f"{module}.weight"].axes[0] != MODEL:
            return
        if self._sequence_parallel:
            yield self._gathered("lm_head")
        # The largest logit; then the normaliser and the target's own logit.
        for numbers in (1, 2):
            yield one_collective("all-reduce", MODEL, numbers * self._tokens, _FP32, "loss")
        yield self._summed(f"lm_head{BACKWARD}")
        vocab_split = plan["model.embed_tokens.weight"].axes[0] == MODEL
        if self._sequence_parallel and vocab_split and not self._adapters:
            yield self._gathered(f"model.embed_tokens{BACKWARD}")

    def _forward(
        self, name: str, firsts: tuple[str, ...], last: str, *, unused: bool = False
    ) -> Iterator[Collective]:
        """One part of a layer.

        Args:
            unused: nobody needs its result; adapters going back need what goes into `last`.
        """
        split = self._split(name, last)
        if split and self._sequence_parallel:
            yield self._gathered(name)
        for each in firsts:
            yield from self._weight(f"{name}.{each}")
            yield from self._weight(f"{name}.{each}.lora_A", label=f"{name}.{each}")
            yield from self._weight(f"{name}.{each}.lora_B", label=f"{name}.{each}")
        if self._adapted(f"{name}.{last}"):
            yield from self._weight(f"{name}.{last}.lora_A", label=f"{name}.{last}")
        if unused:
            return
        yield from self._weight(f"{name}.{last}")
        yield from self._weight(f"{name}.{last}.lora_B", label=f"{name}.{last}")
        if split:
            yield self._summed(f"{name}.{last}")

    def _backward(
        self, name: str, firsts: tuple[str, ...], last: str, *, reaches: bool, trained: bool
    ) -> Iterator[Collective]:
        """One part of a layer, going back.

        Args:
            reaches: what goes in has a gradient.
            trained: something within has one.
        """
        split = self._split(name, last)
        if split and self._sequence_parallel and (reaches or trained):
            yield self._gathered(f"{name}.{last}{BACKWARD}")
        within = reaches or not self._adapters
        within = within or any(self._adapted(f"{name}.{each}") for each in firsts)
        for each, wanted in (*((each, reaches) for each in firsts), (last, within)):
            if wanted:
                yield from self._weight(f"{name}.{each}", BACKWARD)
                yield from self._weight(f"{name}.{each}.lora_A", BACKWARD)
            yield from self._weight(f"{name}.{each}.lora_B", BACKWARD)
        if split and reaches:
            yield self._summed(f"{name}{BACKWARD}")

    def _adapted(self, module: str) -> bool:
        return f"{module}.lora_A.weight" in self._plan

    def _split(self, name: str, last: str) -> bool:
        return self._plan[f"{name}.{last}.weight"].axes[1] == MODEL

    def _weight(
        self, module: str, suffix: str = "", *, label: str | None = None
    ) -> Iterator[Collective]:
        """A weight that is split over "data" is gathered; nothing for a module without one."""
        name = f"{module}.weight"
        if name in self._plan and DATA in self._plan[name].axes:
            numbers = local_elements(self._plan, self._plan[name]) * self._plan.mesh.data
            caused_by = (label or module) + suffix
            yield one_collective("all-gather", DATA, numbers, self._step.moved, caused_by)

    def _summed(self, module: str) -> Collective:
        numbers, itemsize = self._tokens * self._plan.model.hidden, self._step.moved
        if self._sequence_parallel:
            numbers //= self._plan.mesh.model
            return one_collective("reduce-scatter", MODEL, numbers, itemsize, module)
        return one_collective("all-reduce", MODEL, numbers, itemsize, module)

    def _gathered(self, module: str) -> Collective:
        numbers = self._tokens * self._plan.model.hidden
        return one_collective("all-gather", MODEL, numbers, self._step.moved, module)


def _reduction(plan: Plan, sequence_parallel: bool) -> Iterator[Collective]:
    """Sums of gradients, and the loss with the gradient's norm."""
    over_data = partial = repeated = 0
    for placement in trained_parameters(plan):
        elements, gradient = local_elements(plan, placement), f"{placement.name}{GRADIENT}"
        if DATA in placement.axes:
            yield one_collective("reduce-scatter", DATA, elements, _FP32, gradient)
        elif summed_together(placement):
            over_data += elements
        else:
            yield one_collective("all-reduce", DATA, elements, _FP32, gradient)
        if partial_over_model(plan, placement, sequence_parallel=sequence_parallel):
            partial += elements
        repeated += _source_elements(plan, placement)
    for axis, elements in ((DATA, over_data), (MODEL, partial), (MODEL, repeated)):
        if elements:
            yield one_collective("all-reduce", axis, elements, _FP32, TOGETHER)
    axes = [axis for axis, size in plan.mesh.items() if size > 1]
    yield one_collective("all-reduce", "+".join(axes) or MODEL, 2, _FP32, TOGETHER)


def _source_elements(plan: Plan, placement: Placement) -> int:
    """Elements of a gradient with the copies of repeated heads summed; 0 without such heads."""
    blocks = plan.blocks(placement.name)
    if blocks is None or MODEL not in placement.axes or not has_repeats(plan, placement):
        return 0
    local = placement.local_shape(plan.mesh)
    return blocks.source_size * math.prod(local[: blocks.dim] + local[blocks.dim + 1 :])


def summed_together(placement: Placement) -> bool:
    """Whether a gradient is summed over "data" in one collective with others.

    That is so for vectors, and for adapters that are whole along "data".
    """
    return DATA not in placement.axes and (len(placement.shape) == 1 or placement.style == ADAPTER)


def partial_over_model(plan: Plan, placement: Placement, *, sequence_parallel: bool) -> bool:
    """Whether each device along "model" has only a part of a gradient that must be whole there.

    That is so for a parameter which is not split over "model", but used on what is.
    """
    if plan.mesh.model == 1 or MODEL in placement.axes:
        return False
    module = placement.name.rpartition(".")[0]
    parent = module.rpartition(".")[0]
    if placement.style == ADAPTER:
        return MODEL in plan[f"{parent}.weight"].axes
    if module.endswith(("q_norm", "k_norm")):
        return plan[f"{parent}.o_proj.weight"].axes[1] == MODEL
    return len(placement.shape) == 1 and sequence_parallel


def has_repeats(plan: Plan, placement: Placement) -> bool:
    """Whether a parameter holds some head of the checkpoint several times."""
    blocks = plan.blocks(placement.name)
    held = [] if blocks is None else [source for source in blocks.sources if source != EMPTY]
    return len(held) != len(set(held))
