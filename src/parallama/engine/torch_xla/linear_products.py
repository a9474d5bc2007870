"""Products with linear weights, in the form that the backend multiplies fast.

Weights stay `[out, in]`, as in the checkpoint. On XLA:CPU the form depends on the number of rows;
other backends pick layouts themselves, and there products are left as they are.

Shapes: `N` rows, `E` in, `O` out.
"""

# XLA:CPU gives products to Eigen, which packs the left operand. `x @ W.T` packs the weights against
# the grain: 10 times slower at 2 to 4 rows. `(W @ x.T).T` packs them with the grain. It needs a
# barrier before the last transpose, or XLA rewrites it as `x @ W.T`. The same barrier keeps XLA
# from fusing a one-row product with what feeds it, into a loop that is slower than Eigen's.
#
# A few rows are multiplied one by one: matrix times vector needs no packing. Some more rows go to
# oneDNN, which reads weights `[out, in]` faster than Eigen, as long as it has the cores.

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...model.spec import ModelSpec
from ...plan.mesh_shape import DATA, MODEL
from .mesh import DeviceMesh
from .ops import onednn_product
from .ordering import barrier, barrier_all

plain_linear = torch.nn.functional.linear
MOST_SINGLE_ROWS = 3
"""So many rows are multiplied with a weight one by one; packing costs as much as four passes."""
MOST_ONEDNN_ROWS = 128
"""Of so many rows a device oneDNN's products are faster than Eigen's, on one thread each."""
MOST_SHARED_ROWS = 8
"""The same where a single device has several cores, all of which oneDNN takes."""
LEAST_TRANSPOSED_ROWS = 64
"""From so many rows on, a product's input is transposed first, `[E, N]`.

Eigen packs that with the grain, too, and products of the same input share it.
"""
_LEAST_FOR_TWO_ROWS = 1 << 21
"""Two rows are faster one by one, unless an MLP's weights have so many elements."""
_SHARED_LOOP = 512 << 10
"""From so many bytes read and written on, XLA:CPU shares a loop among its threads."""
_SHARED_VECTOR = 128 << 10
"""The same for matrices times vectors, as for cached keys and values: a matrix of more bytes."""


@dataclass(frozen=True, kw_only=True)
class LinearAxes:
    """How a linear's weight `[O, E]`, its input and its result are split.

    Attributes:
        weight: mesh axes of the weight.
        partial: each device has a part of the weight's `E`.
        whole: every device has the whole input; else it is split as the weight's `E` is.
        out: mesh axis over which the result is split, or None.
        shared_rows: rows that oneDNN multiplies although the device has several cores.
    """

    weight: tuple[str | None, str | None]
    partial: bool
    whole: bool
    out: str | None
    shared_rows: range = range(0)

    @property
    def usual(self) -> bool:
        """Whether devices exchange nothing but a sum over the model axis.

        So it is for a column-parallel weight with the whole input, and a row-parallel one with a
        part of it.
        """
        return (self.weight, self.whole, self.out) in (
            ((MODEL, None), True, MODEL),
            ((None, MODEL), False, None),
        )


def shared_rows(mesh: DeviceMesh, model: ModelSpec, length: int) -> range:
    """Rows that oneDNN multiplies in a decode step of a single device with several cores.

    oneDNN takes all cores only on the thread that began the program. XLA:CPU goes on on another
    thread once it shares something among threads: Eigen's products with weights, those with long
    caches, and large loops. The largest loop of a decode step's layers is that of a gated MLP,
    which makes `[intermediate, rows]` out of two such.

    Args:
        length: places of the cache.
    """
    one_device = mesh.shape.devices == 1 and mesh.backend.onednn
    if not one_device or 4 * length * model.head_dim > _SHARED_VECTOR:
        return range(0)
    least = 2 if model.hidden * model.intermediate >= _LEAST_FOR_TWO_ROWS else 3
    unshared = (_SHARED_LOOP - 1) // (3 * 4 * model.intermediate)
    return range(least, 1 + min(MOST_SHARED_ROWS, unshared))


def linear(
    mesh: DeviceMesh, x: torch.Tensor, weight: torch.Tensor, axes: LinearAxes
) -> torch.Tensor:
    """`torch.nn.functional.linear` within a step: `[..., E]`, `[O, E]` -> `[..., O]`."""
    if not mesh.backend.weights_first:
        return plain_linear(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if is_row_by_row(mesh, rows, weight, axes):
        out = torch.cat([_eigen_product(weight, flat[row : row + 1]).t() for row in range(rows)])
    else:
        out = weight_first(mesh, flat, weight, axes).t()
    return out.reshape(*x.shape[:-1], weight.shape[0])


def is_row_by_row(mesh: DeviceMesh, rows: int, weight: torch.Tensor, axes: LinearAxes) -> bool:
    """Whether each row is multiplied by itself."""
    if rows == 1:
        return True
    # With rows split over devices, each has fewer than there are. With a partial weight, each row
    # would have an all-reduce of its own.
    few = rows <= MOST_SINGLE_ROWS and mesh.shape.data == 1 and not axes.partial
    return few and not _by_onednn(mesh, rows, weight, axes)


def weight_first(
    mesh: DeviceMesh,
    x: torch.Tensor,
    weight: torch.Tensor,
    axes: LinearAxes,
    transposed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[N, E]`, `[O, E]` -> `[O, N]`.

    Args:
        transposed: `x.T`, where it is there already.
    """
    if _by_onednn(mesh, x.shape[0], weight, axes):
        return _onednn_product(mesh, x, weight, axes, transposed)
    if transposed is None:
        return _eigen_product(weight, x)
    return barrier(torch.einsum("oe,en->on", weight, transposed))


def _eigen_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[O, E]`, `[N, E]` -> `[O, N]`."""
    return barrier(torch.einsum("oe,ne->on", weight, x))


def _onednn_product(
    mesh: DeviceMesh,
    x: torch.Tensor,
    weight: torch.Tensor,
    axes: LinearAxes,
    transposed: torch.Tensor | None,
) -> torch.Tensor:
    # What enters a manual region is marked. A copy behind a barrier is, not the weight itself.
    own_weight = mesh.enter_manual(barrier_all(weight)[0], axes.weight)
    columns = barrier(x.t().clone()) if transposed is None else transposed
    own = onednn_product(own_weight, mesh.enter_manual(columns, (axes.weight[1], DATA)))
    if axes.partial:
        own = mesh.all_reduce(own, MODEL)
    return mesh.leave_manual(own, (axes.weight[0], DATA), (weight.shape[0], x.shape[0]))


def _by_onednn(mesh: DeviceMesh, rows: int, weight: torch.Tensor, axes: LinearAxes) -> bool:
    """Whether oneDNN multiplies: more than one row a device, and few enough that it is faster.

    How devices share the work of a placement that isn't usual, GSPMD decides.
    """
    if not mesh.backend.onednn or weight.dtype != torch.float32:
        return False
    each, rest = divmod(rows, mesh.shape.data)
    few = range(2, MOST_ONEDNN_ROWS + 1) if mesh.backend.one_core_each else axes.shared_rows
    usual = axes.usual or (mesh.shape.model == 1 and DATA not in axes.weight)
    return rest == 0 and each in few and usual
