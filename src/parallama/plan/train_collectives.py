"""Which collectives a training step costs, before anything is compiled. Pure.

A training step is one manually partitioned region, so its collectives are those that `train.passes` and `train.optimizer` ask for, and these are the same in closed form: Megatron-LM's
(Shoeybi et al., 2019) for what is split over "model", all-gathers and reduce-scatters where weights are split over "data" too (Rajbhandari et al., "ZeRO", 2020), and one sum over "data" of
every gradient, whatever the number of micro-steps.

What runs going back belongs to `MODULE (backward)`, the sum of a parameter's gradient to `PARAMETER (gradient)`, and sums of many small ones at once to `gradients`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import PlanError, lines
from . import heads
from .collectives import Collective, grouped
from .layer_patterns import local_elements
from .mesh_shape import DATA, MODEL
from .placement import Placement, Plan

ADAPTER = "adapter"
"""The style of a placement that is an adapter's: with any in the plan, nothing else is trained."""
BACKWARD = " (backward)"
GRADIENT = " (gradient)"
TOGETHER = "gradients"
_FP32 = 4
_PARTS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    ("mlp", ("gate_proj", "up_proj"), "down_proj"),
)


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What of a training step decides about its collectives.

    Attributes:
        batch: sequences of a micro-step over all devices.
        seq: tokens of a sequence.
        micro_steps: of one optimizer step.
        rematerialized: layers that are computed again for the backward pass.
        sequence_parallel: norms and residuals split over "model" along the sequence.
        itemsize: bytes of an activation.
        moved_itemsize: bytes of an activation or weight while it crosses devices, where the backend widens it; `itemsize` if None.
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
        self._along = step.sequence_parallel and plan.mesh.model > 1
        self._tokens = -(-step.batch // plan.mesh.data) * step.seq
        self._adapters = [each.name for each in plan.parameters if each.style == ADAPTER]

    def collectives(self) -> Iterator[Collective]:
        plan = self._plan
        yield from self._gather("model.embed_tokens", "")
        if plan["model.embed_tokens.weight"].axes[0] == MODEL:
            yield self._leave("model.embed_tokens")
        reaches = not self._adapters  # whether something before has a gradient
        for layer in range(plan.model.layers):
            again = layer in self._step.rematerialized
            for part, firsts, last in _PARTS:
                name = f"model.layers.{layer}.{part}"
                trained = not self._adapters or any(
                    self._adapted(f"{name}.{each}") for each in (*firsts, last)
                )
                yield from self._forward(name, firsts, last)
                if again:
                    yield from self._forward(name, firsts, last, ending=part == "mlp")
                yield from self._backward(name, firsts, last, reaches=reaches, trained=trained)
                reaches = reaches or trained
        yield from self._head()

    def _head(self) -> Iterator[Collective]:
        plan = self._plan
        weight = "model.embed_tokens" if plan.model.tied else "lm_head"
        split = plan[f"{weight}.weight"].axes[0] == MODEL
        for suffix in ("", BACKWARD):
            yield from self._gather(weight, suffix, label="lm_head" if suffix == "" else weight)
        if not split:
            return
        if self._along:
            yield self._all_gather("lm_head")
        # The largest logit; the normaliser and the target's own logit.
        yield from (
            _one("all-reduce", MODEL, numbers * self._tokens, _FP32, "loss") for numbers in (1, 2)
        )
        yield self._summed(f"lm_head{BACKWARD}")
        if (
            self._along
            and plan["model.embed_tokens.weight"].axes[0] == MODEL
            and not self._adapters
        ):
            yield self._all_gather(f"model.embed_tokens{BACKWARD}")

    def _forward(
        self, name: str, firsts: tuple[str, ...], last: str, *, ending: bool = False
    ) -> Iterator[Collective]:
        """One part of a layer; `ending` if nobody needs its result, but adapters going back what goes into them."""
        split = self._split(name, last)
        if split and self._along:
            yield self._all_gather(name)
        for each in firsts:
            yield from self._gather(f"{name}.{each}", "")
            for letter in "AB":
                yield from self._gather(f"{name}.{each}.lora_{letter}", "", label=f"{name}.{each}")
        if self._adapted(f"{name}.{last}"):
            yield from self._gather(f"{name}.{last}.lora_A", "", label=f"{name}.{last}")
        if ending:
            return
        yield from self._gather(f"{name}.{last}", "")
        yield from self._gather(f"{name}.{last}.lora_B", "", label=f"{name}.{last}")
        if split:
            yield self._leave(f"{name}.{last}")

    def _backward(
        self, name: str, firsts: tuple[str, ...], last: str, *, reaches: bool, trained: bool
    ) -> Iterator[Collective]:
        """
        Args:
            reaches: what goes in has a gradient.
            trained: something within has.
        """
        split = self._split(name, last)
        if split and self._along and (reaches or trained):
            yield self._all_gather(f"{name}.{last}{BACKWARD}")
        within = (
            reaches or not self._adapters or any(self._adapted(f"{name}.{each}") for each in firsts)
        )
        for each, wanted in (*((each, reaches) for each in firsts), (last, within)):
            if wanted:
                yield from self._gather(f"{name}.{each}", BACKWARD)
                yield from self._gather(f"{name}.{each}.lora_A", BACKWARD)
            yield from self._gather(f"{name}.{each}.lora_B", BACKWARD)
        if split and reaches:
            yield self._summed(f"{name}{BACKWARD}")

    def _adapted(self, module: str) -> bool:
        return f"{module}.lora_A.weight" in self._plan

    def _split(self, name: str, last: str) -> bool:
        return self._plan[f"{name}.{last}.weight"].axes[1] == MODEL

    def _gather(
        self, module: str, suffix: str, *, label: str | None = None
    ) -> Iterator[Collective]:
        """A weight that is split over "data" is put together."""
        if f"{module}.weight" in self._plan:
            placement = self._plan[f"{module}.weight"]
            if DATA in placement.axes:
                elements = local_elements(self._plan, placement) * self._plan.mesh.data
                yield _one(
                    "all-gather", DATA, elements, self._step.moved, (label or module) + suffix
                )

    def _leave(self, module: str) -> Collective:
        return self._summed(module)

    def _summed(self, module: str) -> Collective:
        numbers, itemsize = self._tokens * self._plan.model.hidden, self._step.moved
        if self._along:
            return _one("reduce-scatter", MODEL, numbers // self._plan.mesh.model, itemsize, module)
        return _one("all-reduce", MODEL, numbers, itemsize, module)

    def _all_gather(self, module: str) -> Collective:
        return _one(
            "all-gather", MODEL, self._tokens * self._plan.model.hidden, self._step.moved, module
        )


def _reduction(plan: Plan, sequence_parallel: bool) -> Iterator[Collective]:
    """Sums of gradients, and the loss with the gradient's norm."""
    trained = trained_parameters(plan)
    small = 0
    for placement in trained:
        elements = local_elements(plan, placement)
        if DATA in placement.axes:
            yield _one("reduce-scatter", DATA, elements, _FP32, f"{placement.name}{GRADIENT}")
        elif summed_together(placement):
            small += elements
        else:
            yield _one("all-reduce", DATA, elements, _FP32, f"{placement.name}{GRADIENT}")
    partial = sum(
        local_elements(plan, each)
        for each in trained
        if partial_over_model(plan, each, sequence_parallel=sequence_parallel)
    )
    copied = 0
    for placement in trained:
        if has_repeats(plan, placement) and MODEL in placement.axes:
            blocks = plan.blocks(placement.name)
            assert blocks is not None
            inside = math.prod(
                size
                for dim, size in enumerate(placement.local_shape(plan.mesh))
                if dim != blocks.dim
            )
            copied += (max(blocks.sources) + 1) * blocks.block * inside
    for axis, elements in ((DATA, small), (MODEL, partial), (MODEL, copied)):
        if elements:
            yield _one("all-reduce", axis, elements, _FP32, TOGETHER)
    axes = [axis for axis in (DATA, MODEL) if plan.mesh.size(axis) > 1]
    yield _one("all-reduce", "+".join(axes) or MODEL, 2, _FP32, TOGETHER)


def check_trainable(plan: Plan) -> None:
    """Raise `PlanError` unless attention and MLP of every layer, embedding and head are each split over "model" in the way of Megatron-LM, or whole."""

    def model_axes(name: str) -> tuple[str | None, ...]:
        return tuple(axis if axis == MODEL else None for axis in plan[name].axes)

    def refuse(name: str, wanted: str) -> None:
        raise PlanError(
            lines(
                f"{name} lies as {list(plan[name].axes)}",
                f"training expects {wanted}",
                "leave it to the default plan",
            )
        )

    for layer in range(plan.model.layers):
        for part, firsts, last in _PARTS:
            prefix = f"model.layers.{layer}.{part}"
            split = model_axes(f"{prefix}.{last}.weight") == (None, MODEL)
            for first in firsts:
                if model_axes(f"{prefix}.{first}.weight") != (
                    (MODEL, None) if split else (None, None)
                ):
                    refuse(
                        f"{prefix}.{first}.weight",
                        f"it split on its outputs, and {last} on its inputs, or both whole over 'model'",
                    )
            if not split and MODEL in model_axes(f"{prefix}.{last}.weight"):
                refuse(f"{prefix}.{last}.weight", "it split on its inputs, or whole over 'model'")
    for name in ("model.embed_tokens.weight", *(() if plan.model.tied else ("lm_head.weight",))):
        if model_axes(name) == (None, MODEL):
            refuse(name, "it split over the vocabulary, or whole over 'model'")
    for placement in plan.parameters:
        split_vector = len(placement.axes) == 1 and placement.axes[0] is not None
        like = placement.name.removesuffix(".bias") + ".weight"
        if split_vector and not (
            placement.name.endswith(".bias")
            and placement.axes[0] == MODEL
            and model_axes(like)[0] == MODEL
        ):
            refuse(placement.name, "vectors whole, but for biases that lie as their weight")
        if placement.name.endswith(".bias") and not split_vector and model_axes(like)[0] == MODEL:
            refuse(placement.name, f"it as {like}, split over 'model'")


def trained_parameters(plan: Plan) -> tuple[Placement, ...]:
    """What gets gradients: the adapters if there are any, else every parameter."""
    return tuple(each for each in plan.parameters if each.style == ADAPTER) or plan.parameters


def summed_together(placement: Placement) -> bool:
    """Whether a gradient is summed over "data" in one collective with others: vectors, and adapters that are whole along it."""
    return DATA not in placement.axes and (len(placement.shape) == 1 or placement.style == ADAPTER)


def partial_over_model(plan: Plan, placement: Placement, *, sequence_parallel: bool) -> bool:
    """Whether each device along "model" has only a part of a gradient that is to be whole there: of a parameter that is not split over "model", but used on what is."""
    if plan.mesh.model == 1 or MODEL in placement.axes:
        return False
    module = placement.name.rpartition(".")[0]
    if placement.style == ADAPTER:
        return MODEL in plan[f"{module.rpartition('.')[0]}.weight"].axes
    if module.endswith(("q_norm", "k_norm")):
        return plan[f"{module.rpartition('.')[0]}.o_proj.weight"].axes[1] == MODEL
    return len(placement.shape) == 1 and sequence_parallel


def has_repeats(plan: Plan, placement: Placement) -> bool:
    """Whether something of the checkpoint stands in several places of a parameter."""
    blocks = plan.blocks(placement.name)
    held = [] if blocks is None else [source for source in blocks.sources if source != heads.EMPTY]
    return len(held) != len(set(held))


def _one(kind: str, axis: str, numbers: int, itemsize: int, module: str) -> Collective:
    return Collective(kind=kind, axis=axis, count=1, bytes=numbers * itemsize, module=module)
