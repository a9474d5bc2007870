"""Which collectives a plan must cause, step by step. Pure theory of tensor parallelism (Shoeybi et al., "Megatron-LM", 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .kinds import kinds, local_elements
from .plan import Plan
from .topology import DATA, MODEL

Phase = Literal["prefill", "decode", "train"]
_FP32 = 4
_CANDIDATE = 5  # numbers that sampling sends a device and row, see `sampling.choose`


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One or several alike collectives of a step.

    Attributes:
        kind: `all-reduce`, `all-gather`.
        axis: the mesh axis it goes over.
        count: how many in one step.
        bytes: of one device's result, of one of them.
        module: what causes it, as `model.layers.*.self_attn.o_proj`.
    """

    kind: str
    axis: str
    count: int
    bytes: int
    module: str


def expected(plan: Plan, phase: Phase, *, batch: int, positions: int, itemsize: int) -> tuple[Collective, ...]:
    """The collectives of one step.

    Args:
        batch: `B`, rows over all devices.
        positions: `S` of a prefill or training step; a decode step has one.
        itemsize: bytes of an activation.
    """
    found = _forward(plan, phase, batch, 1 if phase == "decode" else positions, itemsize)
    if phase == "train":
        found = (*found, *_backward(plan, batch, positions, itemsize))
    return tuple(item for item in found if plan.mesh.size(item.axis) > 1 and item.count)


def _hidden(plan: Plan, batch: int, positions: int, itemsize: int) -> int:
    return math.ceil(batch / plan.mesh.data) * positions * plan.model.hidden * itemsize


def _forward(plan: Plan, phase: Phase, batch: int, positions: int, itemsize: int) -> tuple[Collective, ...]:
    size = _hidden(plan, batch, positions, itemsize)
    rows = math.ceil(batch / plan.mesh.data)
    found = []
    for kind in kinds(plan):
        axes = kind.placement.axes
        if len(axes) != 2:
            continue
        if DATA in axes:
            local = local_elements(plan, kind.placement) * plan.mesh.data * itemsize
            found.append(Collective(kind="all-gather", axis=DATA, count=kind.count, bytes=local, module=kind.module))
        partial = axes[0] if kind.module.endswith("embed_tokens") else axes[1]
        if partial == MODEL:
            found.append(Collective(kind="all-reduce", axis=MODEL, count=kind.count, bytes=size, module=kind.module))
    if _head_axis(plan) == MODEL:
        if phase == "train":
            # The largest logit, the sum of exponentials, and the target's own logit.
            found.append(Collective(kind="all-reduce", axis=MODEL, count=3, bytes=rows * positions * _FP32, module="loss"))
        else:
            size = rows * plan.mesh.model * _CANDIDATE * _FP32
            found.append(Collective(kind="all-gather", axis=MODEL, count=1, bytes=size, module="sampling"))
    return tuple(found)


def _backward(plan: Plan, batch: int, positions: int, itemsize: int) -> Iterator[Collective]:
    """What a column-parallel product replicates going forward, it sums going back; and rows are summed over "data"."""
    size = _hidden(plan, batch, positions, itemsize)
    layers = plan.model.layers
    groups = (("model.layers.*.self_attn", "q_proj"), ("model.layers.*.mlp", "up_proj"))
    for module, first in groups:
        names = [module.replace("*", str(layer)) + f".{first}.weight" for layer in range(layers)]
        split = sum(plan[name].axes[0] == MODEL for name in names if name in plan)
        yield Collective(kind="all-reduce", axis=MODEL, count=split, bytes=size, module=f"{module} (backward)")
    if _head_axis(plan) == MODEL:
        yield Collective(kind="all-reduce", axis=MODEL, count=1, bytes=size, module="lm_head (backward)")
    for kind in kinds(plan):
        local = local_elements(plan, kind.placement) * itemsize
        yield Collective(kind="all-reduce", axis=DATA, count=kind.count, bytes=local, module=f"{kind.module} (gradient)")
    yield Collective(kind="all-reduce", axis=DATA, count=1, bytes=_FP32, module="loss")


def _head_axis(plan: Plan) -> str | None:
    name = "model.embed_tokens.weight" if plan.model.tied else "lm_head.weight"
    return plan[name].axes[0] if name in plan else None
