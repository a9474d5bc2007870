"""Matrix products in the form that the backend multiplies fast: with linear weights, with cached keys, with cached values.

Nothing is stored another way for it: weights stay `[out, in]`, keys and values `[B, K, T, D]`. XLA:CPU hands products to Eigen, which packs its left operand
against the grain of a matrix that is contracted over its last dim. `x @ W.T` does that to the weights: 10 times slower at 2 to 4 rows. `(W @ x.T).T` packs
them with the grain, but XLA turns it back into `x @ W.T` unless a barrier stands before the last transpose; the same barrier keeps XLA from fusing a one-row product
with what feeds it, into a loop that is slower than Eigen's. A few rows are multiplied one by one: matrix times vector needs no packing at all. docs/log.md has
the figures. Where devices have a core each, products of a few rows go to oneDNN instead, which takes one core there and reads weights `[out, in]` faster than Eigen.
So they do in decode steps on a single device, as long as oneDNN has all cores there, see `shared_rows`.
Elsewhere than on the CPU XLA picks layouts itself, and products are left as they are.

Shapes: `N` rows, `E` in, `O` out; `B` rows, `K` KV heads, `M` query rows of a KV head, `T` cache length, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...model.spec import ModelSpec
from ...plan.mesh_shape import DATA, MODEL
from .mesh import DeviceMesh
from .ops import barrier_together, float_bits, float_of_bits, onednn_product, optimization_barrier

_plain_linear = torch.nn.functional.linear
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
_BY_HEAD = (DATA, MODEL, None, None)
TRIGONOMETRIC = {torch.Tensor.cos, torch.Tensor.sin, torch.cos, torch.sin}
"""Transformers computes these once a step; fused into what uses them, XLA:CPU would again for every head of every layer, see `unfused`."""
MOST_SINGLE_ROWS = 3
"""So many rows are multiplied with a weight one by one; packing costs as much as four passes."""
MOST_SINGLE_QUERIES = 4
"""The same for query rows of a KV head."""
MOST_ONEDNN_ROWS = 128
"""Of so many rows a device at most oneDNN's products are faster than Eigen's, on one thread each."""
MOST_SHARED_ROWS = 8
"""The same where a single device has several cores, all of which oneDNN takes."""
_LEAST_FOR_TWO_ROWS = 1 << 21
"""Two rows are faster one by one, unless an MLP's weights have so many elements."""
_SHARED_LOOP = 512 << 10
"""From so many bytes read and written on, XLA:CPU shares a loop among its threads."""
_SHARED_VECTOR = 128 << 10
"""The same for matrices times vectors, as for cached keys and values: a matrix of more bytes."""
LEAST_TURNED = 64
"""From so many rows on, what goes into a product is turned first, `[E, N]`: Eigen packs that with the grain, too. Products of the same input share it."""
MOST_KEYS_FIRST = 64
"""For more query rows than these, transposing the scores costs more than packing the keys."""
LEAST_ONEDNN_MATRICES = 32
"""From so many rows times KV heads on a device on, oneDNN weighs cached values faster than products of one query row at a time, which read them anew for each."""


@dataclass(frozen=True, kw_only=True)
class LinearAxes:
    """How a linear's weight `[O, E]`, its input and its result lie.

    Attributes:
        weight: mesh axes of the weight.
        partial: each device has a part of the weight's `E`.
        whole: every device has the whole input; else it lies as the weight's `E` does.
        out: mesh axis over which the result is split, or None.
        shared_rows: of so many rows oneDNN multiplies although the device has several cores, see `shared_rows`.
    """

    weight: tuple[str | None, str | None]
    partial: bool
    whole: bool
    out: str | None
    shared_rows: range = range(0)

    @property
    def usual(self) -> bool:
        """Whether nothing but a sum over the model axis crosses between devices: column-parallel with the whole input, or row-parallel with a part of it."""
        return (self.weight, self.whole, self.out) in (
            ((MODEL, None), True, MODEL),
            ((None, MODEL), False, None),
        )


def shared_rows(mesh: DeviceMesh, model: ModelSpec, length: int) -> range:
    """Of how many rows oneDNN multiplies in a decode step of a single device with several cores.

    It takes all cores only on the thread that began the program. XLA:CPU goes on on another once it shares something among threads: Eigen's products with weights, those with
    long caches, and large loops, of which that of a gated MLP, `[intermediate, rows]` out of two such, is the largest of a decode step's layers.

    Args:
        length: places of the cache.
    """
    if (
        mesh.shape.devices > 1
        or not mesh.backend.onednn
        or 4 * length * model.head_dim > _SHARED_VECTOR
    ):
        return range(0)
    least = 2 if model.hidden * model.intermediate >= _LEAST_FOR_TWO_ROWS else 3
    return range(
        least, 1 + min(MOST_SHARED_ROWS, (_SHARED_LOOP - 1) // (3 * 4 * model.intermediate))
    )


def linear(
    mesh: DeviceMesh, x: torch.Tensor, weight: torch.Tensor, axes: LinearAxes
) -> torch.Tensor:
    """`torch.nn.functional.linear` within a step: `[..., E]`, `[O, E]` -> `[..., O]`."""
    if not mesh.backend.weights_first:
        return _plain_linear(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    if _row_by_row(mesh, rows, weight, axes):
        out = torch.cat([_eigen_product(weight, flat[row : row + 1]).t() for row in range(rows)])
    else:
        out = _weight_first(mesh, flat, weight, axes).t()
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _row_by_row(mesh: DeviceMesh, rows: int, weight: torch.Tensor, axes: LinearAxes) -> bool:
    # One by one, each row would have an all-reduce of its own; and with rows split over devices each has fewer than there are.
    few = rows <= MOST_SINGLE_ROWS and mesh.shape.data == 1 and not axes.partial
    return rows == 1 or (few and not _by_onednn(mesh, rows, weight, axes))


def _by_onednn(mesh: DeviceMesh, rows: int, weight: torch.Tensor, axes: LinearAxes) -> bool:
    """Whether oneDNN multiplies: more than one row on each device, and few enough that it is faster. How devices share the work of a placement that isn't usual, GSPMD decides."""
    if not mesh.backend.onednn or weight.dtype != torch.float32:
        return False
    each, rest = divmod(rows, mesh.shape.data)
    few = range(2, MOST_ONEDNN_ROWS + 1) if mesh.backend.one_core_each else axes.shared_rows
    lies_as_usual = axes.usual or (mesh.shape.model == 1 and DATA not in axes.weight)
    return rest == 0 and each in few and lies_as_usual


def _weight_first(
    mesh: DeviceMesh,
    x: torch.Tensor,
    weight: torch.Tensor,
    axes: LinearAxes,
    turned: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[N, E]`, `[O, E]` -> `[O, N]`.

    Args:
        turned: `x.T`, where it is there already.
    """
    if not _by_onednn(mesh, x.shape[0], weight, axes):
        return (
            _eigen_product(weight, x)
            if turned is None
            else optimization_barrier(torch.einsum("oe,en->on", weight, turned))
        )
    # What is entered is marked: not the weight itself, which lies as it lies.
    own_weight = mesh.enter_manual(barrier_together(weight)[0], axes.weight)
    columns = optimization_barrier(x.t().clone()) if turned is None else turned
    own = onednn_product(own_weight, mesh.enter_manual(columns, (axes.weight[1], DATA)))
    if axes.partial:
        own = mesh.all_reduce(own, MODEL)
    return mesh.leave_manual(own, (axes.weight[0], DATA), (weight.shape[0], x.shape[0]))


def _eigen_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[O, E]`, `[N, E]` -> `[O, N]`."""
    return optimization_barrier(torch.einsum("oe,ne->on", weight, x))


@dataclass(frozen=True)
class _Columns:
    """A tensor `[..., F]`, and the same as `[F, N]`, from which it is made; `F` is split over `axis`, or whole."""

    tensor: torch.Tensor
    transposed: torch.Tensor
    axis: str | None


class LinearForm(TorchFunctionMode):
    """While a step is traced: every `torch.nn.functional.linear`, a model's own included, becomes `linear`, and what it takes and makes lies as planned.

    The transposed result of a product with many rows, `[F, N]`, is remembered: activation and product of a gated MLP are computed on it, and the next linear multiplies
    with it, so that nothing is read across the grain in between. So are residual stream and norms of `LEAST_TURNED` rows and more: embeddings are turned once, at the beginning.

    Args:
        axes: by the id of the weight, for every weight that the step may meet. Left to itself, GSPMD would let one odd placement spread through the residual stream.
    """

    def __init__(self, mesh: DeviceMesh, axes: Mapping[int, LinearAxes]) -> None:
        super().__init__()
        self._mesh = mesh
        self._axes = axes
        self._columns: dict[
            int, _Columns
        ] = {}  # by the id of the tensor, which lives as long as this does

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is _plain_linear:
            return self._linear(*args, **(kwargs or {}))
        if function is torch.nn.functional.embedding:
            embedded = function(*args, **(kwargs or {}))
            embedded = self._mesh.mark(embedded, _rows_whole(embedded))
            if self._turns(embedded):
                self._turned(embedded)
            return embedded
        if function in TRIGONOMETRIC:
            return unfused(function(*args, **(kwargs or {})))
        if args and _changes_its_argument(function):
            self._columns.pop(id(args[0]), None)
        known = [self._columns.get(id(argument)) for argument in args]
        axis = next((columns.axis for columns in known if columns and columns.axis), None)
        if function in _ELEMENTWISE and args and all(known) and not (kwargs or {}).get("inplace"):
            return self._rows(
                function(*(columns.transposed for columns in known if columns)), args[0].shape, axis
            )
        like = next(
            (argument for argument, columns in zip(args, known, strict=True) if columns), None
        )
        if (
            like is not None
            and self._turns(like)
            and len({columns.transposed.shape[1] for columns in known if columns}) == 1
        ):
            if function in _ELEMENTWISE | _OF_THE_STREAM and not kwargs:
                turned = [
                    _turned_like(argument, columns)
                    for argument, columns in zip(args, known, strict=True)
                ]
                if all(argument is not None for argument in turned):
                    out = function(*turned)
                    self._mesh.mark(
                        out, (axis, DATA)
                    )  # as what it is made of, also where what reads it next is split otherwise
                    return self._rows(out, like.shape, axis)
            if function is torch.Tensor.mean and args[1:] == (-1,) and kwargs == {"keepdim": True}:
                return self._rows(
                    _mean_of_columns(self._columns[id(like)].transposed), like.shape, None
                )
        return function(*args, **(kwargs or {}))

    def _turns(self, x: torch.Tensor) -> bool:
        return self._mesh.backend.weights_first and x.numel() // x.shape[-1] >= LEAST_TURNED

    def _turned(self, x: torch.Tensor, axis: str | None = None) -> _Columns:
        """`[..., F]`, whose `F` lies along `axis`, turned and remembered."""
        known = self._columns[id(x)] = _Columns(
            x, optimization_barrier(x.reshape(-1, x.shape[-1]).t().clone()), axis
        )
        return known

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        axes, known = self._axes[id(weight)], self._columns.get(id(input))
        rows = input.numel() // input.shape[-1]
        if axes.whole:
            self._mesh.mark(input, _rows_whole(input)) if known is None else self._mesh.mark(
                known.transposed, (None, DATA)
            )
        if axes.whole and axes.partial:
            known = None  # of turned inputs that are whole GSPMD would rather gather the weight
        elif known is None and self._mesh.backend.weights_first and rows >= LEAST_TURNED:
            known = self._turned(input, None if axes.whole else MODEL)
        if not self._mesh.backend.weights_first or _row_by_row(self._mesh, rows, weight, axes):
            out = linear(self._mesh, input, weight, axes)
            self._mesh.mark(out, (*_rows_whole(out)[:-1], axes.out))
            return out if bias is None else out + bias
        out = _weight_first(
            self._mesh,
            input.reshape(rows, -1),
            weight,
            axes,
            None if known is None else known.transposed,
        )
        self._mesh.mark(out, (axes.out, DATA))
        return self._rows(out if bias is None else out + bias[:, None], input.shape, axes.out)

    def _rows(
        self, transposed: torch.Tensor, like: Sequence[int], axis: str | None
    ) -> torch.Tensor:
        """`[F, N]`, whose `F` lies along `axis` -> `[..., F]`, remembered."""
        tensor = transposed.t().reshape(*like[:-1], transposed.shape[0])
        self._columns[id(tensor)] = _Columns(tensor, transposed, axis)
        return tensor


def _changes_its_argument(function: Callable[..., Any]) -> bool:
    name: str = getattr(function, "__name__", "")
    return (
        name.startswith("__i")
        or name == "__setitem__"
        or (name.endswith("_") and not name.endswith("__"))
    )


def _turned_like(argument: Any, columns: _Columns | None) -> Any:
    """What stands for an argument among turned tensors: a weight `[F]` goes down the columns, numbers and dtypes stay. None for what doesn't."""
    if columns is not None:
        return columns.transposed
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument[:, None] if argument.dim() == 1 else None


def _mean_of_columns(x: torch.Tensor) -> torch.Tensor:
    """`[F, N]` -> `[1, N]`, as a product: XLA:CPU would sum each column by itself, against the grain."""
    return torch.matmul(
        torch.full((1, x.shape[0]), 1 / x.shape[0], dtype=x.dtype, device=x.device), x
    )


def unfused(x: torch.Tensor) -> torch.Tensor:
    """`[..., D]`, itself: a product with the identity, which is exact, is what XLA:CPU does not compute anew in everything that reads it."""
    return torch.matmul(x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))


def _rows_whole(x: torch.Tensor) -> tuple[str | None, ...]:
    """Rows split, the rest whole: `[B, ...]`."""
    return (DATA, *(None,) * (x.dim() - 1))


def scores(mesh: DeviceMesh, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[B, K, M, D]`, `[B, K, T, D]` -> `[B, K, M, T]`."""
    if not mesh.backend.weights_first or query.shape[2] > MOST_KEYS_FIRST:
        return torch.einsum("bkmd,bktd->bkmt", query, keys)
    if _one_by_one(mesh, query):
        return torch.stack(
            [torch.einsum("bktd,bkd->bkt", keys, row) for row in query.unbind(2)], dim=2
        )
    return optimization_barrier(torch.einsum("bktd,bkmd->bktm", keys, query)).transpose(2, 3)


def mixture(mesh: DeviceMesh, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`[B, K, M, T]`, `[B, K, T, D]` -> `[B, K, M, D]`."""
    if not (mesh.backend.weights_first and _one_by_one(mesh, weights)):
        return torch.einsum("bkmt,bktd->bkmd", weights, values)
    if (
        mesh.backend.onednn
        and weights.shape[2] > 1
        and values.dtype == torch.float32
        and _matrices(mesh, values) >= LEAST_ONEDNN_MATRICES
    ):
        own = onednn_product(*(mesh.enter_manual(tensor, _BY_HEAD) for tensor in (weights, values)))
        return mesh.leave_manual(own, _BY_HEAD, (*weights.shape[:3], values.shape[3]))
    return torch.stack(
        [torch.einsum("bktd,bkt->bkd", values, row) for row in weights.unbind(2)], dim=2
    )


def _one_by_one(mesh: DeviceMesh, query: torch.Tensor) -> bool:
    """Whether query rows `[B, K, M, ...]` are best multiplied one at a time: few of them, and several matrices on a device. Matrix times vector
    alone, without batch dims, XLA fuses with all that feeds it into one slow loop."""
    return query.shape[2] <= MOST_SINGLE_QUERIES and _matrices(mesh, query) > 1


def row_maximum(mesh: DeviceMesh, x: torch.Tensor) -> torch.Tensor:
    """`x.amax(-1, keepdim=True)` of fp32 numbers `[..., T]`, on the CPU by way of integers in the same order: XLA takes maxima of floats one by one there, for it must see NaN, and of integers in vectors.

    A NaN is the highest of all, or, with its sign set, the lowest; what is computed with NaN beside the maximum is NaN either way.
    """
    if not mesh.backend.weights_first:
        return x.amax(-1, keepdim=True)
    return float_of_bits(_in_order(_in_order(float_bits(x)).amax(-1, keepdim=True)))


def _in_order(bits: torch.Tensor) -> torch.Tensor:
    """Bits of fp32 numbers as integers in the order of the numbers, and back: all but the sign are turned over where it is set."""
    zero = torch.zeros(
        (), dtype=bits.dtype, device=bits.device
    )  # with a plain 0 torch-xla would compare in 64 bits
    return torch.where(bits < zero, ~bits + -(2**31), bits)


def _matrices(mesh: DeviceMesh, x: torch.Tensor) -> int:
    """Of `[B, K, ...]`, on a device."""
    return (x.shape[0] // mesh.shape.data) * (x.shape[1] // mesh.shape.model)
