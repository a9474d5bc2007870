"""What an optimizer step takes: bytes on each device. Pure arithmetic, all of it predicted.

`parallama audit --phase train` tells what XLA sets aside for a compiled step. Shapes by the letters
of docs/design.md; here `b` is the rows of one device, and `H`, `K`, `F`, `V` are its share after
head layout and padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cost import activation_bytes
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
        gradients: their sums, in fp32. Of a weight that is split over "data" the whole gradient is
            summed until the micro-steps are done, and reduced once.
        copies: weights in the products' dtype where that isn't fp32, and the largest weight that
            is gathered over "data".
        activations: kept for the backward pass, and the working set where that begins. A layer
            that is computed again keeps its input only.
        activations_remat: the same if every layer is computed again.
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
        """What the step takes beside weights and optimizer, at its peak.

        That is in the last micro-step: where its backward pass begins, or where it ends and all
        gradients are there.
        """
        return self._working(self.activations)

    @property
    def total(self) -> int:
        return self.params + self.optimizer + self.working

    @property
    def total_remat(self) -> int:
        return self.params + self.optimizer + self._working(self.activations_remat)

    def _working(self, activations: int) -> int:
        earlier_micro_steps = self.gradients if self.micro_steps > 1 else 0
        peak = max(activations + self.logits, self.gradients + self.backward)
        return self.copies + earlier_micro_steps + peak


def train_memory(plan: Plan, step: TrainStep, *, optimizer_slots: int = 2) -> TrainMemory:
    """Bytes on each device in an optimizer step.

    Kept for the backward pass are the inputs of every product and of every non-linear function,
    counted as in Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
    Models" (2022), section 4; see `_layer_bytes`. Of a layer that is computed again (Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016) that is only its input, `b S E`.
    On top comes one layer's working set (`cost.activation_bytes`).

    Args:
        plan: of the training run, as `train.layout.training_plan` makes it.
        optimizer_slots: numbers that the optimizer keeps for each trained one: 2 for AdamW, 1 for
            SGD with momentum.
    """
    model, itemsize, again = plan.model, step.itemsize, len(step.rematerialized)
    tokens = plan.local_rows(step.batch) * step.seq
    layer = _layer_bytes(plan, step)
    layer_input = tokens * _residual(plan, step) * itemsize
    working_set = activation_bytes(plan, step.batch, step.seq, step.seq, itemsize)
    trained = trained_parameters(plan)
    held = sum(local_elements(plan, placement) for placement in plan.parameters)
    kept = sum(local_elements(plan, placement) for placement in trained) * optimizer_slots
    summed = sum(_summed_elements(plan, placement, step.micro_steps) for placement in trained)
    kept_layers = (model.layers - again) * layer + again * layer_input
    return TrainMemory(
        params=held * _FP32,
        optimizer=kept * _FP32 + _FP32,
        gradients=summed * _FP32,
        copies=_copies(plan, itemsize),
        activations=kept_layers + working_set,
        activations_remat=model.layers * layer_input + working_set,
        backward=layer + layer_input,
        logits=tokens * (plan.vocab // plan.mesh.model) * 2 * _FP32,
        micro_steps=step.micro_steps,
    )


def _layer_bytes(plan: Plan, step: TrainStep) -> int:
    """What one layer keeps for the backward pass.

    `b S (4 E + (2 H + 2 K) D + 5 F)` numbers: inputs and outputs of two norms; queries, keys,
    values and attention's output; gate, its sigmoid and its activation, up, and their product.
    And the fp32 attention weights `b H S S`, with their copy in the products' dtype.
    With sequence parallelism the input of a norm is split, its output is not.
    """
    model, split = plan.model, plan.mesh.model
    tokens = plan.local_rows(step.batch) * step.seq
    queries = len(plan.head_layout.query_sources) // split
    kv_heads, inner = plan.head_layout.slots // split, plan.intermediate // split
    norms = 2 * _residual(plan, step) + 2 * model.hidden
    numbers = norms + (2 * queries + 2 * kv_heads) * model.head_dim + 5 * inner
    adapted = {each.name.split(".")[-3] for each in plan.parameters if each.style == ADAPTER}
    if adapted:
        # A frozen weight has no gradient: the input of its product is not kept.
        inputs = {
            ("q_proj", "k_proj", "v_proj"): model.hidden,
            ("gate_proj", "up_proj"): model.hidden,
            ("o_proj",): queries * model.head_dim,
            ("down_proj",): inner,
        }
        numbers -= sum(size for products, size in inputs.items() if adapted.isdisjoint(products))
    copy = step.itemsize if step.itemsize != _FP32 else 0
    return tokens * numbers * step.itemsize + tokens * queries * step.seq * (_FP32 + copy)


def _residual(plan: Plan, step: TrainStep) -> int:
    """Numbers of the residual stream that a device keeps of each position."""
    hidden = plan.model.hidden
    return hidden // plan.mesh.model if step.sequence_parallel else hidden


def _parts_over_data(plan: Plan, placement: Placement) -> int:
    return plan.mesh.data if DATA in placement.axes else 1


def _summed_elements(plan: Plan, placement: Placement, micro_steps: int) -> int:
    """Elements of a gradient's sum.

    The gradient of a single micro-step is reduced over "data" at once; that of several when all
    are done.
    """
    parts = _parts_over_data(plan, placement) if micro_steps > 1 else 1
    return local_elements(plan, placement) * parts


def _copies(plan: Plan, itemsize: int) -> int:
    cast, gathered = 0, [0]
    for placement in plan.parameters:
        parts, elements = _parts_over_data(plan, placement), local_elements(plan, placement)
        if len(placement.shape) < 2:
            continue
        if parts > 1:
            gathered.append(elements * parts)
        elif itemsize != _FP32:
            cast += elements
    return (cast + max(gathered)) * itemsize
