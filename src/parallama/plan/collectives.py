"""Which collectives a step of inference needs, before anything is compiled. Pure.

The steps say how every activation is split, so the plan alone tells what GSPMD must insert.
`prove.audit` holds compiled programs against this; `train_collectives` has a training step's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .layer_patterns import local_elements, with_layers, without_layer
from .make_plan import make_plan
from .mesh_shape import DATA, MODEL
from .placement import Plan
from .program_shapes import MOST_TOP

Phase = Literal["prefill", "decode", "copy", "train"]
INFERENCE: tuple[Phase, ...] = ("prefill", "decode")
CANDIDATE_NUMBERS = 5
"""What each device says of its best token, in fp32: see `sampling.choose`."""
SEARCH_NUMBERS = 15
"""Thresholds that a round of `sampling`'s search for top-k or top-p tries: a sum of each."""
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective, as often as a step does it.

    Attributes:
        kind: XLA's name, as `all-reduce`.
        axis: the mesh axis along which devices take part.
        count: how often in one step. Those of `sampling.truncation` are done only where a row
            samples: the searches for top-k and top-p where one asks for them, 8 rounds each. Those
            of `sampling.top_logprobs` are done only where a row asks for likeliest tokens.
        bytes: of the result on one device, each time.
        module: whose product or lookup makes it necessary. `*` stands for every layer, `0,2-5`
            for these.
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
    slots: bool = True,
) -> tuple[Collective, ...]:
    """What one step needs on a mesh, in the order of the model.

    The residual stream is whole on every device. A product with a weight that is split on its
    inputs is summed; what is split is gathered before a product that needs it whole.

    Args:
        phase: prefill of `positions` positions a row, decode of one, or copy of a slot.
        batch: rows over all devices.
        itemsize: bytes of an activation.
        sum_itemsize: bytes of an activation while it is summed over devices, where the backend
            widens it; `itemsize` if None.
        everywhere: the last layer gives every position's state, not only those that next tokens
            follow (see `last_positions`).
        slots: the step runs on slots, and tells the likeliest tokens besides.
    """
    if phase == "copy":
        return ()
    rows = plan.local_rows(batch)
    tokens = rows * (1 if phase == "decode" else positions)
    sizes = _Sizes(
        rows=rows,
        tokens=tokens,
        last_tokens=tokens if everywhere else rows,
        itemsize=itemsize,
        sum_itemsize=sum_itemsize or itemsize,
    )
    found = [*_forward(plan, sizes), *_next_token(plan, sizes, slots)]
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
    slots: bool = True,
) -> tuple[Collective, ...]:
    """What the same step needs at least on this mesh, which is what the default plan needs.

    That is two all-reduces a layer, one for the embedding, and what choosing the next token needs.
    """
    default = make_plan(plan.model, plan.mesh)
    return expected_collectives(
        default,
        phase,
        batch=batch,
        positions=positions,
        itemsize=itemsize,
        sum_itemsize=sum_itemsize,
        slots=slots,
    )


def grouped(single: Counter[Collective], layers: int) -> tuple[Collective, ...]:
    """Collectives of single modules, those of several layers together.

    Args:
        single: with how often each is done.
        layers: of the model.

    Returns:
        In the order in which they first come.
    """
    found: dict[Collective, list[tuple[int | None, int]]] = {}
    for each, count in single.items():
        name, layer = without_layer(each.module)
        found.setdefault(replace(each, module=name), []).append((layer, each.count * count))
    together = []
    for each, members in found.items():
        module = with_layers(each.module, [layer for layer, _ in members], layers)
        together.append(replace(each, module=module, count=sum(count for _, count in members)))
    return tuple(together)


def one_collective(kind: str, axis: str, numbers: int, itemsize: int, module: str) -> Collective:
    """A collective that is done once, of so many numbers."""
    return Collective(kind=kind, axis=axis, count=1, bytes=numbers * itemsize, module=module)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Of a step on one device.

    Attributes:
        rows: of the batch.
        tokens: in all rows.
        last_tokens: those that go through the end of the last layer.
        itemsize, sum_itemsize: bytes of a number that is gathered, or summed.
    """

    rows: int
    tokens: int
    last_tokens: int
    itemsize: int
    sum_itemsize: int


def _forward(plan: Plan, sizes: _Sizes) -> Iterator[Collective]:
    """From token ids to the last hidden states."""
    spec, products = plan.model, _Products(plan, sizes)
    kv = plan.head_layout.slots * spec.head_dim
    query, intermediate = kv * plan.head_layout.group, plan.intermediate
    yield from products.embedding("model.embed_tokens")
    for layer in range(spec.layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, features in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
            yield from products.first(f"{attention}.{name}", features, sizes.tokens)
        tokens = sizes.tokens if layer < spec.layers - 1 else sizes.last_tokens
        # The cache is split over heads, and so is what is read from it.
        yield from products.last(f"{attention}.o_proj", query, tokens, split=True)
        split = False
        for name in ("gate_proj", "up_proj"):
            yield from products.first(f"{mlp}.{name}", intermediate, tokens)
            split = split or plan[f"{mlp}.{name}.weight"].axes[0] == MODEL
        yield from products.last(f"{mlp}.down_proj", intermediate, tokens, split=split)


def _next_token(plan: Plan, sizes: _Sizes, slots: bool) -> Iterator[Collective]:
    """From the last hidden states to a token."""
    head = "model.embed_tokens.weight" if plan.model.tied else "lm_head.weight"
    if plan[head].axes[1] == MODEL:
        logits = sizes.rows * plan.vocab
        yield one_collective("all-reduce", MODEL, logits, sizes.sum_itemsize, "lm_head")
    parts = plan.mesh.model
    candidates = parts * sizes.rows * CANDIDATE_NUMBERS
    yield one_collective("all-gather", MODEL, candidates, _FP32, "sampling")
    for numbers in (SEARCH_NUMBERS, SEARCH_NUMBERS, 1, 1):  # both searches, peak and mass
        yield one_collective(
            "all-reduce", MODEL, sizes.rows * numbers, _FP32, "sampling.truncation"
        )
    for _ in range(2 if slots else 0):  # ids and logits of each device's likeliest
        yield one_collective(
            "all-reduce", MODEL, sizes.rows * parts * MOST_TOP, _FP32, "sampling.top_logprobs"
        )


@dataclass(frozen=True)
class _Products:
    """What the products and the lookup of a forward pass need."""

    plan: Plan
    sizes: _Sizes

    def embedding(self, module: str) -> Iterator[Collective]:
        """The lookup of token ids."""
        yield from self._weight(module)
        vocab_axis, hidden_axis = self.plan[f"{module}.weight"].axes
        numbers = self.sizes.tokens * self.plan.model.hidden
        if vocab_axis == MODEL:
            yield self._sum(module, numbers)
        elif hidden_axis == MODEL:
            yield self._gather(module, numbers)

    def first(self, module: str, features: int, tokens: int) -> Iterator[Collective]:
        """A product with the residual stream, whose result stays split on its outputs."""
        yield from self._weight(module)
        if self.plan[f"{module}.weight"].axes[1] == MODEL:
            yield self._sum(module, tokens * features)

    def last(self, module: str, features: int, tokens: int, *, split: bool) -> Iterator[Collective]:
        """A product whose result is added to the residual stream.

        Args:
            features: of its input.
            split: the input is split over "model".
        """
        hidden = self.plan.model.hidden
        yield from self.first(module, hidden, tokens)
        out_axis, in_axis = self.plan[f"{module}.weight"].axes
        if split and in_axis != MODEL:
            yield self._gather(module, tokens * features)
        if out_axis == MODEL:
            yield self._gather(module, tokens * hidden)

    def _weight(self, module: str) -> Iterator[Collective]:
        """A weight that is split over "data" is gathered first."""
        placement = self.plan[f"{module}.weight"]
        if DATA in placement.axes:
            numbers = local_elements(self.plan, placement) * self.plan.mesh.data
            yield one_collective("all-gather", DATA, numbers, self.sizes.itemsize, module)

    def _sum(self, module: str, numbers: int) -> Collective:
        return one_collective("all-reduce", MODEL, numbers, self.sizes.sum_itemsize, module)

    def _gather(self, module: str, numbers: int) -> Collective:
        return one_collective("all-gather", MODEL, numbers, self.sizes.itemsize, module)
