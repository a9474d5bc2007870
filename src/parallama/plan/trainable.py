"""Which plans training follows, and which of their parameters it trains. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import PlanError, lines
from .mesh_shape import MODEL
from .placement import Axes, Placement, Plan

ADAPTER = "adapter"
"""The style of an adapter's placements: with any in the plan, nothing else is trained."""
LAYER_PARTS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    ("mlp", ("gate_proj", "up_proj"), "down_proj"),
)
"""The parts of a layer: products with the residual stream, and the one that is added to it."""


def trained_parameters(plan: Plan) -> tuple[Placement, ...]:
    """What gets gradients: the adapters if there are any, else every parameter."""
    return tuple(each for each in plan.parameters if each.style == ADAPTER) or plan.parameters


def check_trainable(plan: Plan) -> None:
    """Raise `PlanError` unless training follows the plan.

    Over "model", attention and MLP of every layer, embedding and head must each be split in the
    way of Megatron-LM (Shoeybi et al., 2019), or whole.
    """
    fault = next(_faults(plan), None)
    if fault is not None:
        name, expected = fault
        raise PlanError(
            lines(
                f"{name} is placed as {list(plan[name].axes)}",
                f"training expects {expected}",
                "leave it to the default plan",
            )
        )


def _faults(plan: Plan) -> Iterator[tuple[str, str]]:
    """Parameters that training cannot follow, and what it expects of each."""
    for layer in range(plan.model.layers):
        for part, firsts, last in LAYER_PARTS:
            yield from _faults_of_part(plan, f"model.layers.{layer}.{part}", firsts, last)
    head = () if plan.model.tied else ("lm_head.weight",)
    for name in ("model.embed_tokens.weight", *head):
        if _over_model(plan, name) == (None, MODEL):
            yield name, "it split over the vocabulary, or whole over 'model'"
    for placement in plan.parameters:
        if len(placement.axes) == 1:
            yield from _faults_of_vector(plan, placement)


def _faults_of_part(
    plan: Plan, part: str, firsts: tuple[str, ...], last: str
) -> Iterator[tuple[str, str]]:
    """Split on the outputs, then on the inputs; or whole."""
    weight = f"{part}.{last}.weight"
    split = _over_model(plan, weight) == (None, MODEL)
    for first in firsts:
        name = f"{part}.{first}.weight"
        if _over_model(plan, name) != ((MODEL, None) if split else (None, None)):
            expected = f"it split on its outputs, and {last} on its inputs, or both whole"
            yield name, f"{expected} over 'model'"
    if not split and MODEL in plan[weight].axes:
        yield weight, "it split on its inputs, or whole over 'model'"


def _faults_of_vector(plan: Plan, vector: Placement) -> Iterator[tuple[str, str]]:
    """Whole; but a bias is split as the outputs of its weight."""
    (axis,) = vector.axes
    weight = f"{vector.name.removesuffix('.bias')}.weight"
    is_bias = vector.name.endswith(".bias")
    outputs_split = is_bias and plan[weight].axes[0] == MODEL
    if axis is not None and not (axis == MODEL and outputs_split):
        yield vector.name, "vectors whole, but for biases, which are split as their weight"
    if axis is None and outputs_split:
        yield vector.name, f"it as {weight}, split over 'model'"


def _over_model(plan: Plan, name: str) -> Axes:
    """A parameter's axes, "model" alone."""
    return tuple(axis if axis == MODEL else None for axis in plan[name].axes)
