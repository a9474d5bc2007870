"""While a step is traced: a model's own linears become products in the form that is fast.

What goes into and comes out of every linear is split as planned: left to itself, GSPMD would let
one odd placement spread through the residual stream.

Shapes: `B` rows, `S` positions, `N = B * S`, `F` any features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...plan.mesh_shape import DATA, MODEL
from .linear_products import (
    LEAST_TRANSPOSED_ROWS,
    LinearAxes,
    is_row_by_row,
    linear,
    plain_linear,
    weight_first,
)
from .mesh import DeviceMesh
from .ordering import TRIGONOMETRIC, barrier, kept_apart

_ELEMENTWISE = {
    torch.Tensor.mul,
    torch.Tensor.__mul__,
    torch.mul,
    torch.nn.functional.silu,
    torch.nn.functional.gelu,
}
ADDITIONS = {torch.Tensor.add, torch.Tensor.__add__, torch.add}
# What residual additions and norms are made of.
_OF_THE_STREAM = ADDITIONS | {
    torch.Tensor.pow,
    torch.pow,
    torch.Tensor.rsqrt,
    torch.rsqrt,
    torch.Tensor.to,
}


@dataclass(frozen=True)
class _Columns:
    """A tensor `[..., F]`, and the same as `[F, N]`, from which it is made.

    Attributes:
        axis: the mesh axis that `F` is split over, or None.
    """

    tensor: torch.Tensor
    transposed: torch.Tensor
    axis: str | None


class LinearForm(TorchFunctionMode):
    """Takes over every `torch.nn.functional.linear`, and remembers transposed tensors.

    The transposed result of a product with many rows, `[F, N]`, is remembered. Activation and
    product of a gated MLP are computed on it, and the next linear multiplies with it, so that
    nothing is read across the grain in between. So are residual stream and norms of
    `LEAST_TRANSPOSED_ROWS` rows and more: embeddings are transposed once, at the beginning.

    Args:
        axes: by the id of the weight, for every weight that the step may meet.
    """

    def __init__(self, mesh: DeviceMesh, axes: Mapping[int, LinearAxes]) -> None:
        super().__init__()
        self._mesh = mesh
        self._axes = axes
        # By the id of the tensor, which is kept alive with it.
        self._columns: dict[int, _Columns] = {}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is plain_linear:
            return self._linear(*args, **kwargs)
        if function is torch.nn.functional.embedding:
            embedded = self._mesh.mark_rows(function(*args, **kwargs))
            if self._is_transposed_first(embedded):
                self._transpose(embedded)
            return embedded
        if function in TRIGONOMETRIC:
            return kept_apart(function(*args, **kwargs))
        if args and _changes_its_argument(function, kwargs):
            self._columns.pop(id(args[0]), None)
        computed = self._on_columns(function, args, kwargs)
        return function(*args, **kwargs) if computed is None else computed

    def _on_columns(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """The function's result, computed on transposed tensors; None where it can't be."""
        known = [self._columns.get(id(argument)) for argument in args]
        columns = [each for each in known if each is not None]
        if not columns:
            return None
        axis = next((each.axis for each in columns if each.axis), None)
        if function in _ELEMENTWISE and len(columns) == len(args) and not kwargs.get("inplace"):
            transposed = function(*(each.transposed for each in columns), **kwargs)
            return self._rows(transposed, args[0].shape, axis)
        like = columns[0].tensor
        same_rows = len({each.transposed.shape[1] for each in columns}) == 1
        if not (self._is_transposed_first(like) and same_rows):
            return None
        if function in _ELEMENTWISE | _OF_THE_STREAM and not kwargs:
            standing_in = [_stand_in(*each) for each in zip(args, known, strict=True)]
            if any(argument is None for argument in standing_in):
                return None
            # Split as what it is made of, also where what reads it next is split otherwise.
            out = self._mesh.mark(function(*standing_in), (axis, DATA))
            return self._rows(out, like.shape, axis)
        if function is torch.Tensor.mean and args[1:] == (-1,) and kwargs == {"keepdim": True}:
            return self._rows(_mean_of_columns(columns[0].transposed), like.shape, None)
        return None

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        mesh, axes, known = self._mesh, self._axes[id(weight)], self._columns.get(id(input))
        rows = input.numel() // input.shape[-1]
        if axes.whole and known is None:
            mesh.mark_rows(input)
        elif axes.whole and known is not None:
            mesh.mark(known.transposed, (None, DATA))
        if axes.whole and axes.partial:
            known = None  # for a transposed input that is whole GSPMD would gather the weight
        elif known is None and self._is_transposed_first(input):
            known = self._transpose(input, None if axes.whole else MODEL)
        if not mesh.backend.weights_first or is_row_by_row(mesh, rows, weight, axes):
            out = linear(mesh, input, weight, axes)
            mesh.mark(out, (DATA, *(None,) * (out.dim() - 2), axes.out))
            return out if bias is None else out + bias
        transposed = None if known is None else known.transposed
        out = weight_first(mesh, input.reshape(rows, -1), weight, axes, transposed)
        mesh.mark(out, (axes.out, DATA))
        return self._rows(out if bias is None else out + bias[:, None], input.shape, axes.out)

    def _is_transposed_first(self, x: torch.Tensor) -> bool:
        rows = x.numel() // x.shape[-1]
        return self._mesh.backend.weights_first and rows >= LEAST_TRANSPOSED_ROWS

    def _transpose(self, x: torch.Tensor, axis: str | None = None) -> _Columns:
        """`[..., F]`, whose `F` is split over `axis`: transposed, and remembered."""
        transposed = barrier(x.reshape(-1, x.shape[-1]).t().clone())
        columns = self._columns[id(x)] = _Columns(x, transposed, axis)
        return columns

    def _rows(
        self, transposed: torch.Tensor, like: Sequence[int], axis: str | None
    ) -> torch.Tensor:
        """`[F, N]`, whose `F` is split over `axis`, -> `[..., F]`, remembered."""
        tensor = transposed.t().reshape(*like[:-1], transposed.shape[0])
        self._columns[id(tensor)] = _Columns(tensor, transposed, axis)
        return tensor


def _changes_its_argument(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name: str = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        name.startswith("__i") or name == "__setitem__" or in_place or bool(kwargs.get("inplace"))
    )


def _stand_in(argument: Any, columns: _Columns | None) -> Any:
    """What stands for an argument among transposed tensors; None where nothing can.

    A weight `[F]` goes down the columns. Numbers and dtypes stay.
    """
    if columns is not None:
        return columns.transposed
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument[:, None] if argument.dim() == 1 else None


def _mean_of_columns(x: torch.Tensor) -> torch.Tensor:
    """`[F, N]` -> `[1, N]`, as a product: XLA:CPU would sum each column by itself."""
    shares = torch.full((1, x.shape[0]), 1 / x.shape[0], dtype=x.dtype, device=x.device)
    return torch.matmul(shares, x)
