"""A device's part of a weight, and the products with it, in the forms that XLA:CPU does fast.

The forms hold for forward and backward; docs/history/log.md has the figures. Gradients of matrices
don't go through autograd but into a sink. Shapes: `N` rows, `E` in, `O` out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.ordering import SUM_ROWS, after, barrier
from ...engine.torch_xla.scopes import scope
from ...plan.mesh_shape import DATA
from ...plan.train_collectives import BACKWARD

LEAST_NATURAL = 16
"""From so many rows on, a product is computed as `x @ W.T`.

`(W @ x.T).T` is a faster product, but its result is transposed in memory, and all that is computed
from it reads against that order.
"""
MOST_OUTPUTS = 4096
"""A product with more outputs is done in parts of so many.

XLA:CPU packs a transposed weight first; for a whole vocabulary that takes as long as the product.
"""


class _Product(torch.autograd.Function):
    """`x @ W.T`, `[N, E]` and `[O, E]`.

    A weight that is split over "data" is all-gathered for the product, and again in the backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Weight, anchor: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return weight.times(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,), weight, (gradient,) = ctx.saved_tensors, ctx.weight, gradients
        with scope(f"{weight.module}{BACKWARD}"):
            if weight.sink is not None:
                weight.sink(torch.einsum("no,ne->oe", gradient, x))
            needed = ctx.needs_input_grad[0]
            return gradient @ weight.whole(gradient) if needed else None, None, None


class _Scaled(torch.autograd.Function):
    """`weight * x`, `[E]` and `[..., E]`.

    The weight's gradient is a sum over rows. XLA:CPU would go down each column for it; a product
    with ones goes along the rows. With several rows of ones it stays a product.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, x, one)
        return weight * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (weight, x, one), (gradient,) = ctx.saved_tensors, gradients
        sums = None
        if ctx.needs_input_grad[0]:
            rows = (gradient * x).flatten(0, -2).float()
            sums = (one.expand(SUM_ROWS, rows.shape[0]) @ rows)[0].to(weight.dtype)
        return sums, (gradient * weight if ctx.needs_input_grad[1] else None), None


@dataclass(frozen=True, eq=False)
class Weight:
    """A device's part of a matrix.

    Attributes:
        module: its name.
        part: as it is stored.
        gather: the dim along which the parts of the "data" axis are all-gathered, or None.
        dtype: of products.
        sink: where the gradient goes; None if there is none.
        anchor: a leaf of autograd's graphs that stands for the weight. Because of it autograd also
            runs the backward of a product whose input needs no gradient.
    """

    module: str
    mesh: DeviceMesh
    part: torch.Tensor
    gather: int | None
    dtype: torch.dtype
    sink: Callable[[torch.Tensor], None] | None
    anchor: torch.Tensor

    def whole(self, first: torch.Tensor) -> torch.Tensor:
        """The weight, all-gathered over "data", not before `first` is computed.

        XLA would find the same all-gather in every pass, and keep the first one's result through
        the whole step.
        """
        part = self.part.to(self.dtype)
        if self.gather is None or self.mesh.shape.size(DATA) == 1:
            return part
        return self.mesh.all_gather(after(part, first), DATA, self.gather)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, E]` -> `[N, O]`."""
        weight = self.whole(x)
        if not self.mesh.backend.weights_first:
            return x @ weight.t()
        if x.shape[0] < LEAST_NATURAL:
            return barrier(torch.einsum("oe,ne->on", weight, x)).t()
        if len(weight) > MOST_OUTPUTS:
            return torch.cat([x @ part.t() for part in weight.split(MOST_OUTPUTS)], dim=-1)
        return x @ weight.t()


def product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`[..., E]` -> `[..., O]`."""
    anchor = weight.anchor if weight.sink is not None else None
    out = _Product.apply(x.reshape(-1, x.shape[-1]), weight, anchor)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def scaled(weight: torch.Tensor, x: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """`[E]` times `[..., E]`, where the weight's gradient is summed over rows by a product.

    Args:
        one: `[1]` fp32, the number 1, which XLA must not know: it makes a product with ones a sum.
    """
    return _Scaled.apply(weight, x, one)
