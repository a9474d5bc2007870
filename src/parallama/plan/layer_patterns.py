"""A plan's parameters without the repetition of layers, and layer numbers in names. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from .placement import Placement, Plan


@dataclass(frozen=True, kw_only=True)
class LayerPattern:
    """Parameters that differ only in their layer.

    Attributes:
        name: their name with `*` for the layer. Where not all layers are placed alike, these
            layers' numbers stand in its place, as `0,2-5`.
        count: how many there are.
        placement: of the first of them.
    """

    name: str
    count: int
    placement: Placement

    @property
    def title(self) -> str:
        """For people: the name without what all share, and how many there are."""
        return self.name.removeprefix("model.") + (f" x{self.count}" if self.count > 1 else "")

    @property
    def module(self) -> str:
        """The module's name, without `.weight` or `.bias`."""
        return self.name.rpartition(".")[0]


def layer_patterns(plan: Plan) -> tuple[LayerPattern, ...]:
    """The patterns of a plan's parameters, in the model's order.

    Layers of one parameter that are placed in different ways follow each other.
    """
    found: dict[str, dict[tuple[object, ...], list[Placement]]] = {}
    for each in plan.parameters:
        name, _ = without_layer(each.name)
        how = (each.source_shape, each.shape, each.axes, each.style, each.reason)
        found.setdefault(name, {}).setdefault(how, []).append(each)
    patterns = []
    for name, ways in found.items():
        for members in ways.values():
            numbers = [without_layer(each.name)[1] for each in members]
            pattern = LayerPattern(
                name=with_layers(name, numbers, plan.model.layers),
                count=len(members),
                placement=members[0],
            )
            patterns.append(pattern)
    return tuple(patterns)


def without_layer(name: str) -> tuple[str, int | None]:
    """A name with `*` for the layer's number, and that number.

    `model.layers.3.mlp.up_proj.weight` -> (`model.layers.*.mlp.up_proj.weight`, 3); other names
    -> (name, None).
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part == "layers" and parts[index + 1].isdigit():
            return ".".join([*parts[: index + 1], "*", *parts[index + 2 :]]), int(parts[index + 1])
    return name, None


def with_layers(pattern: str, numbers: Collection[int | None], layers: int) -> str:
    """A pattern with the numbers of its layers instead of `*`, unless it is all of the model's."""
    known = sorted({number for number in numbers if number is not None})
    return pattern if len(known) in (0, layers) else pattern.replace("*", ranges(known), 1)


def ranges(numbers: list[int]) -> str:
    """Ascending numbers, runs of them short: `0,2-5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def local_elements(plan: Plan, placement: Placement) -> int:
    """Elements that each device holds of a parameter."""
    return math.prod(placement.local_shape(plan.mesh))
