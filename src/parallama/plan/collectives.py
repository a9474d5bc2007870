"""Which collectives a plan costs in a step, before anything is compiled. Pure.

The steps of inference say how every activation lies (see `products.LinearForm`), so what GSPMD must insert follows from the plan alone: the residual stream is whole on every
device, a product with a weight that is split on its inputs is summed, and what is split is gathered before a product that needs it whole. `audit` holds compiled programs against this.
`train_collectives` has those of a training step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .layer_patterns import local_elements, ranges, without_layer
from .make_plan import make_plan
from .mesh_shape import DATA, MODEL
from .placement import Plan

Phase = Literal["prefill", "decode", "train"]
INFERENCE: tuple[Phase, ...] = ("prefill", "decode")
CANDIDATE_NUMBERS = 5
"""What a device says of its best token, in fp32: see `sampling.choose`."""
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective, as often as a step does it.

    Attributes:
        kind: XLA's name, as `all-reduce`.
        axis: the mesh axis along which devices take part.
        count: how often in one step.
        bytes: of the result on one device, each time.
        module: whose product or lookup makes it necessary. `*` stands for every layer, `0,2-5` for these.
    """

    kind: str
    axis: str
    count: int
    bytes: int
    module: str


def expected_collectives(
    plan: Plan,
    phase: Phase,
    *,
    batch: int,
    positions: int,
    itemsize: int,
    sum_itemsize: int | None = None,
    everywhere: bool = False,
) -> tuple[Collective, ...]:
    """What one step needs on a mesh, in the order of the model.

    Args:
        phase: prefill of `positions` positions a row, or decode of one.
        batch: rows over all devices.
        itemsize: bytes of an activation.
        sum_itemsize: bytes of an activation while it is summed over devices, where the backend widens it; `itemsize` if None.
        everywhere: the last layer gives every position's state, not only those that next tokens follow (see `last_positions`).
    """
    rows = -(-batch // plan.mesh.data)
    tokens = rows * (1 if phase == "decode" else positions)
    sizes = _Sizes(
        rows=rows,
        tokens=tokens,
        ending=tokens if everywhere else rows,
        itemsize=itemsize,
        summed=sum_itemsize or itemsize,
    )
    found = [*_forward(plan, sizes), *_end(plan, sizes)]
    needed = Counter(each for each in found if plan.mesh.size(each.axis) > 1)
    return grouped(needed, plan.model.layers)


def minimal_collectives(
    plan: Plan,
    phase: Phase,
    *,
    batch: int,
    positions: int,
    itemsize: int,
    sum_itemsize: int | None = None,
) -> tuple[Collective, ...]:
    """What the same step needs at least on this mesh: two all-reduces a layer, one for the embedding, and the candidates of the pick."""
    own = make_plan(plan.model, plan.mesh)
    return expected_collectives(
        own, phase, batch=batch, positions=positions, itemsize=itemsize, sum_itemsize=sum_itemsize
    )


def grouped(single: Counter[Collective], layers: int) -> tuple[Collective, ...]:
    """Collectives of concrete modules, the same of several layers put together; in the order in which they first come."""
    found: dict[Collective, list[tuple[int | None, int]]] = {}
    for each, count in single.items():
        name, layer = without_layer(each.module)
        found.setdefault(replace(each, module=name), []).append((layer, each.count * count))
    together = []
    for each, members in found.items():
        numbers = sorted({layer for layer, _ in members if layer is not None})
        module = (
            each.module
            if len(numbers) in (0, layers)
            else each.module.replace("*", ranges(numbers), 1)
        )
        together.append(replace(each, module=module, count=sum(count for _, count in members)))
    return tuple(together)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Of a step on one device: rows, tokens, those that go through the end of the last layer, and bytes of a number that is gathered or summed."""

    rows: int
    tokens: int
    ending: int
    itemsize: int
    summed: int


def _one(kind: str, axis: str, numbers: int, itemsize: int, module: str) -> Collective:
    return Collective(kind=kind, axis=axis, count=1, bytes=numbers * itemsize, module=module)


def _forward(plan: Plan, sizes: _Sizes) -> Iterator[Collective]:
    """From token ids to the last hidden states."""
    spec, tokens = plan.model, sizes.tokens
    slots = plan.head_layout.slots * spec.head_dim
    query, inner = slots * plan.head_layout.group, plan.intermediate

    def weight(module: str) -> Iterator[Collective]:
        """A weight that is split over "data" is put together first."""
        placement = plan[f"{module}.weight"]
        if DATA in placement.axes:
            yield _one(
                "all-gather",
                DATA,
                local_elements(plan, placement) * plan.mesh.data,
                sizes.itemsize,
                module,
            )

    def summed(module: str, features: int, tokens: int) -> Iterator[Collective]:
        """A product that is whole, or split on its outputs, where it ends."""
        yield from weight(module)
        if plan[f"{module}.weight"].axes[1] == MODEL:
            yield _one("all-reduce", MODEL, tokens * features, sizes.summed, module)

    def ending(module: str, features: int, tokens: int, *, split: bool) -> Iterator[Collective]:
        """A product whose input of `features` lies split or whole, and whose result is added to the residual stream."""
        yield from summed(module, spec.hidden, tokens)
        axes = plan[f"{module}.weight"].axes
        if axes[1] != MODEL and split:
            yield _one("all-gather", MODEL, tokens * features, sizes.itemsize, module)
        if axes[0] == MODEL:
            yield _one("all-gather", MODEL, tokens * spec.hidden, sizes.itemsize, module)

    table = "model.embed_tokens"
    yield from weight(table)
    axes = plan[f"{table}.weight"].axes
    if axes[0] == MODEL:
        yield _one("all-reduce", MODEL, tokens * spec.hidden, sizes.summed, table)
    elif axes[1] == MODEL:
        yield _one("all-gather", MODEL, tokens * spec.hidden, sizes.itemsize, table)
    for layer in range(spec.layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, features in (("q_proj", query), ("k_proj", slots), ("v_proj", slots)):
            yield from summed(f"{attention}.{name}", features, tokens)
        after = tokens if layer < spec.layers - 1 else sizes.ending
        yield from ending(
            f"{attention}.o_proj", query, after, split=True
        )  # the cache is split over heads, and so is what is read from it
        for name in ("gate_proj", "up_proj"):
            yield from summed(f"{mlp}.{name}", inner, after)
        halves = (plan[f"{mlp}.{name}.weight"].axes[0] for name in ("gate_proj", "up_proj"))
        yield from ending(f"{mlp}.down_proj", inner, after, split=MODEL in halves)


def _end(plan: Plan, sizes: _Sizes) -> Iterator[Collective]:
    """From the last hidden states to a token."""
    if plan[_head(plan)].axes[1] == MODEL:
        yield _one("all-reduce", MODEL, sizes.rows * plan.vocab, sizes.summed, "lm_head")
    yield _one(
        "all-gather", MODEL, plan.mesh.model * sizes.rows * CANDIDATE_NUMBERS, _FP32, "sampling"
    )


def _head(plan: Plan) -> str:
    return "model.embed_tokens.weight" if plan.model.tied else "lm_head.weight"
