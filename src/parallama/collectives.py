"""Which collectives a plan costs in a step, before anything is compiled. Pure.

The steps say how every activation lies (see `products.LinearForm`), so what GSPMD must insert follows from the plan alone: the residual stream is whole on every device, a product
with a weight that is split on its inputs is summed, and what is split is gathered before a product that needs it whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .plan import Axes, Plan, make_plan
from .topology import MODEL

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
CANDIDATE_NUMBERS = 5
"""What a device says of its best token, in fp32: see `sampling`."""
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective, as often as a step does it.

    Attributes:
        kind: XLA's name, as `all-reduce`.
        axis: the mesh axis along which devices take part.
        count: how often in one step.
        bytes: of the result on one device, each time.
        module: whose product or lookup makes it necessary; `*` stands for every layer.
    """

    kind: str
    axis: str
    count: int
    bytes: int
    module: str


def expected(
    plan: Plan, phase: Phase, *, batch: int, positions: int, itemsize: int, sum_itemsize: int | None = None
) -> tuple[Collective, ...]:
    """What one step needs on a mesh, in the order of the model.

    Args:
        phase: prefill of `positions` new positions a row (every row's chunk, as padded), or decode of one.
        batch: rows over all devices.
        itemsize: bytes of an activation.
        sum_itemsize: bytes of an activation while it is summed over devices, where the backend widens it; `itemsize` if None.
    """
    devices = plan.mesh.size(MODEL)
    if devices == 1:
        return ()
    spec = plan.model
    rows = -(-batch // plan.mesh.data)
    tokens = rows * (positions if phase == "prefill" else 1)
    summed = itemsize if sum_itemsize is None else sum_itemsize
    heads = plan.head_layout.slots * plan.head_layout.group
    layer = "model.layers.*"
    found: list[Collective] = []

    def axes(module: str) -> Axes:
        return plan[f"{module.replace('*', '0')}.weight"].axes

    def needs(kind: str, numbers: int, size: int, module: str) -> None:
        found.append(Collective(kind=kind, axis=MODEL, count=spec.layers if "*" in module else 1, bytes=numbers * size, module=module))

    def sums(module: str, features: int) -> bool:
        """A product with a weight that is split on its inputs."""
        if axes(module)[1] == MODEL:
            needs("all-reduce", tokens * features, summed, module)
        return axes(module)[1] == MODEL

    def ends(module: str, features: int, *, split: bool) -> None:
        """A product whose input of `features` lies split or whole, and whose result is added to the residual stream."""
        if not sums(module, spec.hidden):
            if split:
                needs("all-gather", tokens * features, itemsize, module)
            if axes(module)[0] == MODEL:
                needs("all-gather", tokens * spec.hidden, itemsize, module)

    table = axes("model.embed_tokens")
    if MODEL in table:
        kind, size = ("all-reduce", summed) if table[0] == MODEL else ("all-gather", itemsize)
        needs(kind, tokens * spec.hidden, size, "model.embed_tokens")
    query, kv = heads * spec.head_dim, plan.head_layout.slots * spec.head_dim
    for name, features in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
        sums(f"{layer}.self_attn.{name}", features)
    ends(f"{layer}.self_attn.o_proj", query, split=True)  # the cache is split over heads, and so is what is read from it
    inner = [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
    for module in inner:
        sums(module, plan.intermediate)
    ends(f"{layer}.mlp.down_proj", plan.intermediate, split=any(axes(module)[0] == MODEL for module in inner))
    head = table if spec.tied else axes("lm_head")
    if head[1] == MODEL:
        needs("all-reduce", rows * plan.vocab, summed, "lm_head")
    needs("all-gather", devices * rows * CANDIDATE_NUMBERS, _FP32, "sampling")
    return tuple(found)


def least(
    plan: Plan, phase: Phase, *, batch: int, positions: int, itemsize: int, sum_itemsize: int | None = None
) -> tuple[Collective, ...]:
    """What the same step needs at least on this mesh: two all-reduces a layer, one for the embedding, and the candidates of the pick."""
    own = make_plan(plan.model, plan.mesh)
    return expected(own, phase, batch=batch, positions=positions, itemsize=itemsize, sum_itemsize=sum_itemsize)


def total_bytes(collectives: Iterable[Collective]) -> int:
    """Bytes that one device receives in a step."""
    return sum(each.count * each.bytes for each in collectives)
