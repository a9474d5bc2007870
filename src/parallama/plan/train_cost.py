"""What an optimizer step takes: bytes on each device. Pure arithmetic, all of it predicted; `parallama audit --phase train` says what XLA sets aside for a compiled one.

Shapes by the letters of docs/design.md; `b` is the rows of one device, and `H`, `K`, `F`, `V` are one device's share after head layout and padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cost import activation_bytes, local_rows
from .layer_patterns import local_elements
from .mesh_shape import DATA
from .placement import Placement, Plan
from .train_collectives import TrainStep
from .trainable import ADAPTER, trained_parameters

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes on each device in an optimizer step.

    Attributes:
        params: weights, adapters included, in fp32 whatever the products' dtype.
        optimizer: what the optimizer keeps, in fp32, and the number of the step.
        gradients: their sums, in fp32. What is split over "data" is summed whole until the micro-steps are done: it crosses once a step.
        copies: weights in the products' dtype where that isn't fp32, and the largest that is put together over "data".
        activations: kept for the backward pass, and what is worked on when that begins; layers that are computed again keep their input.
        activations_remat: the same if every layer is.
        backward: one layer's activations and its gradient, when the backward pass ends.
        logits: fp32 logits of every position, and their gradient.
        micro_steps: of one optimizer step.
    """

    params: int
    optimizer: int
    gradients: int
    copies: int
    activations: int
    activations_remat: int
    backward: int
    logits: int
    micro_steps: int

    @property
    def working(self) -> int:
        """What the step takes beside weights and optimizer, at its peak: where the backward pass of the last micro-step begins, or where it ends with all gradients there."""
        return self._working(self.activations)

    @property
    def total(self) -> int:
        return self.params + self.optimizer + self.working

    @property
    def total_remat(self) -> int:
        return self.params + self.optimizer + self._working(self.activations_remat)

    def _working(self, activations: int) -> int:
        before = (
            self.gradients if self.micro_steps > 1 else 0
        )  # sums of the micro-steps that are done
        return self.copies + before + max(activations + self.logits, self.gradients + self.backward)


def train_memory(plan: Plan, step: TrainStep, *, optimizer_slots: int = 2) -> TrainMemory:
    """Bytes on each device in an optimizer step.

    Kept for the backward pass are the inputs of every product and of every non-linear function, counted as in Korthikanti et al., "Reducing Activation
    Recomputation in Large Transformer Models" (2022), section 4, for a Llama layer: `b S (4 E + (2 H + 2 K) D + 5 F)` numbers (the inputs and
    outputs of two norms; queries, keys, values and attention's output; gate, its sigmoid and its activation, up, and the product), and the fp32 attention weights
    `b H S S` with their copy in the products' dtype. Of a layer that is computed again (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) only `b S E`.
    With sequence parallelism what goes into a norm is split, what comes out of it is not. On top of that one layer's working set (`cost.activation_bytes`).

    Args:
        plan: of the training run, as `train.layout.training_plan` makes it.
        optimizer_slots: numbers that the optimizer keeps of each that is trained: 2 for AdamW, 1 for SGD with momentum.
    """
    model, split, itemsize = plan.model, plan.mesh.model, step.itemsize
    tokens = local_rows(plan, step.batch) * step.seq
    queries, kept_heads, inner = (
        len(plan.head_layout.query_sources) // split,
        plan.head_layout.slots // split,
        plan.intermediate // split,
    )
    residual = model.hidden // split if step.sequence_parallel else model.hidden
    numbers = (
        2 * residual
        + 2 * model.hidden
        + (2 * queries + 2 * kept_heads) * model.head_dim
        + 5 * inner
    )
    adapted = {
        placement.name.split(".")[-3] for placement in plan.parameters if placement.style == ADAPTER
    }
    if adapted:  # of the others' weights there is no gradient to be made: their inputs are not kept
        inputs = {
            ("q_proj", "k_proj", "v_proj"): model.hidden,
            ("gate_proj", "up_proj"): model.hidden,
        }
        inputs |= {("o_proj",): queries * model.head_dim, ("down_proj",): inner}
        numbers -= sum(count for targets, count in inputs.items() if adapted.isdisjoint(targets))
    weights = tokens * queries * step.seq * (_FP32 + (itemsize if itemsize != _FP32 else 0))
    layer = tokens * numbers * itemsize + weights
    top = activation_bytes(plan, step.batch, step.seq, step.seq, itemsize)
    again = len(step.rematerialized)
    entered = tokens * residual * itemsize
    trained = sum(local_elements(plan, placement) for placement in trained_parameters(plan))
    return TrainMemory(
        params=sum(local_elements(plan, placement) for placement in plan.parameters) * _FP32,
        optimizer=trained * optimizer_slots * _FP32 + _FP32,
        gradients=sum(
            _summed_elements(plan, placement, step.micro_steps)
            for placement in trained_parameters(plan)
        )
        * _FP32,
        copies=_copies(plan, itemsize),
        activations=(model.layers - again) * layer + again * entered + top,
        activations_remat=model.layers * entered + top,
        backward=layer + entered,
        logits=tokens * (plan.vocab // split) * 2 * _FP32,
        micro_steps=step.micro_steps,
    )


def _over_data(plan: Plan, placement: Placement) -> int:
    return plan.mesh.data if DATA in placement.axes else 1


def _summed_elements(plan: Plan, placement: Placement, micro_steps: int) -> int:
    """Elements of a gradient: one that is there once is reduced over "data" at once, sums of several when all are there."""
    return local_elements(plan, placement) * (_over_data(plan, placement) if micro_steps > 1 else 1)


def _copies(plan: Plan, itemsize: int) -> int:
    matrices = [placement for placement in plan.parameters if len(placement.shape) > 1]
    gathered = [
        local_elements(plan, each) * plan.mesh.data
        for each in matrices
        if _over_data(plan, each) > 1
    ]
    cast = (
        sum(local_elements(plan, each) for each in matrices if _over_data(plan, each) == 1)
        if itemsize != _FP32
        else 0
    )
    return (cast + max(gathered, default=0)) * itemsize
