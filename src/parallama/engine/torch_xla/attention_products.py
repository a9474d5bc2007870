"""Products with cached keys and values, and a softmax's maxima, in the form fast on XLA:CPU.

Keys and values stay `[B, K, T, D]`. Other backends pick layouts themselves, and there products are
left as they are.

Shapes: `B` rows, `K` KV heads, `M` query rows of a KV head, `T` cache length, `D` head dim.
"""

from __future__ import annotations

import torch

from ..steps import CACHE_AXES
from .mesh import DeviceMesh
from .ops import float_bits, float_of_bits, onednn_product
from .ordering import barrier

MOST_SINGLE_QUERIES = 4
"""So many query rows of a KV head are multiplied one by one; packing costs as much as four."""
MOST_KEYS_FIRST = 64
"""For more query rows than these, transposing the scores costs more than packing the keys."""
LEAST_ONEDNN_MATRICES = 32
"""From so many rows times KV heads on a device on, oneDNN weighs cached values faster.

Products of one query row at a time read the values anew for each.
"""


def scores(mesh: DeviceMesh, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[B, K, M, D]`, `[B, K, T, D]` -> `[B, K, M, T]`."""
    if not mesh.backend.weights_first or query.shape[2] > MOST_KEYS_FIRST:
        return torch.einsum("bkmd,bktd->bkmt", query, keys)
    if _one_by_one(mesh, query):
        rows = [torch.einsum("bktd,bkd->bkt", keys, row) for row in query.unbind(2)]
        return torch.stack(rows, dim=2)
    return barrier(torch.einsum("bktd,bkmd->bktm", keys, query)).transpose(2, 3)


def mixture(mesh: DeviceMesh, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`[B, K, M, T]`, `[B, K, T, D]` -> `[B, K, M, D]`."""
    if not (mesh.backend.weights_first and _one_by_one(mesh, weights)):
        return torch.einsum("bkmt,bktd->bkmd", weights, values)
    if _by_onednn(mesh, weights, values):
        own = [mesh.enter_manual(tensor, CACHE_AXES) for tensor in (weights, values)]
        shape = (*weights.shape[:3], values.shape[3])
        return mesh.leave_manual(onednn_product(*own), CACHE_AXES, shape)
    rows = [torch.einsum("bktd,bkt->bkd", values, row) for row in weights.unbind(2)]
    return torch.stack(rows, dim=2)


def scores_in_part(mesh: DeviceMesh, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`scores` of each device's own part."""
    if mesh.backend.weights_first and query.shape[2] <= MOST_SINGLE_QUERIES:
        rows = [torch.einsum("bktd,bkd->bkt", keys, row) for row in query.unbind(2)]
        return torch.stack(rows, dim=2)
    return torch.einsum("bkmd,bktd->bkmt", query, keys)


def mixture_in_part(mesh: DeviceMesh, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`mixture` of each device's own part."""
    if mesh.backend.weights_first and weights.shape[2] <= MOST_SINGLE_QUERIES:
        rows = [torch.einsum("bktd,bkt->bkd", values, row) for row in weights.unbind(2)]
        return torch.stack(rows, dim=2)
    return torch.einsum("bkmt,bktd->bkmd", weights, values)


def row_maximum(mesh: DeviceMesh, x: torch.Tensor) -> torch.Tensor:
    """`x.amax(-1, keepdim=True)` of fp32 numbers `[..., T]`.

    XLA:CPU takes maxima of floats one by one, for it must see NaN, and of integers in vectors. So
    they are taken of integers in the same order. A NaN is the highest of all, or the lowest if its
    sign is set; what is computed with NaN beside the maximum is NaN either way.
    """
    if not mesh.backend.weights_first:
        return x.amax(-1, keepdim=True)
    return float_of_bits(_in_order(_in_order(float_bits(x)).amax(-1, keepdim=True)))


def _in_order(bits: torch.Tensor) -> torch.Tensor:
    """Bits of fp32 numbers as integers in the order of the numbers, and back.

    All bits but the sign are flipped where the sign is set.
    """
    # With a plain 0 torch-xla would compare in 64 bits.
    zero = torch.zeros((), dtype=bits.dtype, device=bits.device)
    return torch.where(bits < zero, ~bits + -(2**31), bits)


def _one_by_one(mesh: DeviceMesh, query: torch.Tensor) -> bool:
    """Whether query rows `[B, K, M, ...]` are best multiplied one at a time.

    So it is for few of them, and several matrices on a device. XLA fuses matrix times vector alone,
    without batch dims, with all that feeds it, into one slow loop.
    """
    return query.shape[2] <= MOST_SINGLE_QUERIES and _matrices(mesh, query) > 1


def _by_onednn(mesh: DeviceMesh, weights: torch.Tensor, values: torch.Tensor) -> bool:
    many = weights.shape[2] > 1 and _matrices(mesh, values) >= LEAST_ONEDNN_MATRICES
    return mesh.backend.onednn and values.dtype == torch.float32 and many


def _matrices(mesh: DeviceMesh, x: torch.Tensor) -> int:
    """How many matrices of `[B, K, ...]` a device has."""
    return (x.shape[0] // mesh.shape.data) * (x.shape[1] // mesh.shape.model)
