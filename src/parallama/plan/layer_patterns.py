"""Tensors of one kind: a plan's parameters without the repetition of layers. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .placement import Placement, Plan


@dataclass(frozen=True, kw_only=True)
class LayerPattern:
    """Parameters that differ only in their layer.

    Attributes:
        name: their name with `*` for the layer; where not all layers lie alike, with these layers' numbers, as `0,2-5`.
        count: how many there are.
        placement: the first of them.
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
    """The kinds of a plan's parameters, in the model's order; layers that lie differently stand below one another."""
    found: dict[str, dict[tuple[object, ...], list[tuple[int | None, Placement]]]] = {}
    for placement in plan.parameters:
        name, layer = without_layer(placement.name)
        how = (
            placement.source_shape,
            placement.shape,
            placement.axes,
            placement.style,
            placement.reason,
        )
        found.setdefault(name, {}).setdefault(how, []).append((layer, placement))
    return tuple(
        LayerPattern(
            name=_name(name, [layer for layer, _ in members], plan.model.layers),
            count=len(members),
            placement=members[0][1],
        )
        for name, alike in found.items()
        for members in alike.values()
    )


def without_layer(name: str) -> tuple[str, int | None]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.*.mlp.up_proj.weight`, 3); other names -> (name, None)."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part == "layers" and parts[index + 1].isdigit():
            return ".".join([*parts[: index + 1], "*", *parts[index + 2 :]]), int(parts[index + 1])
    return name, None


def local_elements(plan: Plan, placement: Placement) -> int:
    """Elements that each device holds of a parameter."""
    return math.prod(placement.local_shape(plan.mesh))


def ranges(numbers: list[int]) -> str:
    """Ascending numbers, runs of them short: `0,2-5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _name(pattern: str, layers: list[int | None], of: int) -> str:
    numbered = [layer for layer in layers if layer is not None]
    return pattern if len(numbered) in (0, of) else pattern.replace("*", ranges(numbered), 1)
