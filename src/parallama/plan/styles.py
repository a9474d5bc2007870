"""What a style means: the mesh axis of every dim of a parameter. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PlanError, UsageError, lines, shown
from .mesh_shape import MODEL, axis_name
from .placement import Axes

Style = str | Sequence[str | None]
"""One of `STYLES`, or a list of axes, one (or None) per dim."""
STYLES = ("colwise", "rowwise", "vocab", "replicate")
"""How a weight `[out, in]` is split: `colwise` on `out`, `rowwise` on `in`, `replicate` not at all.

`vocab` splits an embedding or head `[V, E]` on `V`.
"""
TRANSFORMERS_STYLES = {
    "replicated_with_grad_allreduce": "replicate",
    "colwise_gather_output": "vocab",
    "colwise_rep": "vocab",
    "embedding_rowwise": "vocab",
}
"""transformers' own style names, where they differ from ours."""


def axes_of(name: str, rank: int, style: Style) -> Axes:
    """The axes of a parameter with `rank` dims.

    Args:
        name: of the parameter, for messages.

    Raises:
        PlanError: the style is unknown, or a list of axes does not fit the dims.
    """
    return _of_style(name, rank, style) if isinstance(style, str) else _listed(name, rank, style)


def _of_style(name: str, rank: int, style: str) -> Axes:
    if style not in STYLES:
        raise PlanError(
            lines(
                f"style {style!r} for {name} is unknown",
                f"expected one of {', '.join(STYLES)}, or a list of axes",
            )
        )
    whole = (None,) * (rank - 1)
    if style == "replicate" or (style == "rowwise" and rank == 1):
        return (None, *whole)
    return (*whole, MODEL) if style == "rowwise" else (MODEL, *whole)


def _listed(name: str, rank: int, style: Sequence[str | None]) -> Axes:
    if not is_axes(style):
        raise PlanError(
            lines(
                f"{name} is given {shown(style)}",
                f"expected one of {', '.join(STYLES)}, or a list of axis names and nulls",
            )
        )
    try:
        axes = tuple(None if axis is None else axis_name(axis) for axis in style)
    except UsageError as error:
        raise PlanError(str(error)) from None
    if len(axes) != rank:
        raise PlanError(
            lines(
                f"{name} has {rank} dims, the plan gives {len(axes)} axes: {list(axes)}",
                "expected one axis (or null) per dim",
            )
        )
    split = [axis for axis in axes if axis is not None]
    if len(split) != len(set(split)):
        raise PlanError(
            lines(
                f"{name}: axes {list(axes)} use one axis twice", "expected each axis at most once"
            )
        )
    return axes


def is_axes(style: object) -> bool:
    """Whether this is a list of names and nulls."""
    return isinstance(style, Sequence) and all(
        axis is None or isinstance(axis, str) for axis in style
    )
