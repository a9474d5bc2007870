"""Operations that torch-xla has no good lowering for, written on XLA's own builder.

Shapes: `B` rows, `K` KV heads, `S` new positions, `T` cache length, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import onednn

_BITS_OF_ONE = 0x3F800000
_SIXTEEN_BITS = {torch.bfloat16: "BF16", torch.float16: "F16"}


def row_update(
    buffer: torch.Tensor, new: torch.Tensor, row: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """Row `r` of `new` goes to `buffer[row + r]` at `starts[r]` along dim 2.

    It is one plain dynamic-update-slice a row, without the bounds check of `index_copy`.

    Args:
        buffer: `[B, K, T, D]`.
        new: `[R, K, S, D]`, of as many rows as the buffer or fewer.
        row: int32 scalar.
        starts: `[R]` int32.
    """
    return _registered(_lower_row_update)(buffer, new, row, starts)


def add_at(counts: torch.Tensor, places: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """`counts` `[B, W]` with `added[r]` more at `places[r]` of each of the first `R` rows `r`.

    Args:
        places, added: `[R]` int32.
    """
    return _registered(_lower_add_at)(counts, places, added)


def stretch(
    buffer: torch.Tensor, row: torch.Tensor, rows: int, first: torch.Tensor, length: int
) -> torch.Tensor:
    """`buffer[row : row + rows, :, first : first + length]` of `[B, K, T, D]`.

    Args:
        row, first: int32 scalars, which only the device knows.
    """
    return _registered(_lower_stretch)(buffer, row, first, rows=rows, length=length)


def onednn_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[..., O, E]` x `[..., E, N]` -> `[..., O, N]` of fp32 by oneDNN, on XLA:CPU only.

    Where devices share the work, both are each device's own part (`DeviceMesh.enter_manual`).
    """
    import torch_xla

    computation = _onednn_computation(tuple(left.shape), tuple(right.shape))
    return torch_xla._XLAC._xla_user_computation(
        "xla::_op_parallama_onednn_product", [left, right], computation
    )[0]


def float_bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of fp32 numbers as int32; for `x.view(torch.int32)` torch-xla uses the host."""
    return _bitcast(x, "S32")


def float_of_bits(bits: torch.Tensor) -> torch.Tensor:
    """What `float_bits` was given."""
    return _bitcast(bits, "F32")


def whole_as_float(number: torch.Tensor) -> torch.Tensor:
    """Whole numbers from 0 to 2^30 - 1 as fp32 numbers of at least 1, each as another one.

    As their values, fp32 would tell them apart only below 2^24. The numbers are neither NaN, zero
    nor denormal, so nothing on the way changes their bits, and a sum with zeros doesn't either.
    """
    return float_of_bits(number.to(torch.int32) + _BITS_OF_ONE)


def whole_of_float(x: torch.Tensor) -> torch.Tensor:
    """What `whole_as_float` was given, as int64."""
    return (float_bits(x) - _BITS_OF_ONE).long()


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of 16-bit floats as int16; other tensors as they are.

    XLA:CPU would move such floats between devices as fp32.
    """
    return _bitcast(x, "S16") if x.dtype in _SIXTEEN_BITS else x


def of_bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `as_bits` was given."""
    return _bitcast(x, _SIXTEEN_BITS[dtype]) if dtype in _SIXTEEN_BITS else x


def _bitcast(x: torch.Tensor, to: str) -> torch.Tensor:
    return _registered(_lower_bitcast)(x, to=to)


def _lower_row_update(buffer: Any, new: Any, row: Any, starts: Any) -> Any:
    from torch_xla.core import xla_builder as xb

    builder = buffer.builder()
    zero = xb.Op.zero(builder, xb.Type.S32)
    for index in range(new.shape().sizes[0]):
        place = row + xb.Op.scalar(builder, index, xb.Type.S32)
        start = starts.slice_in_dim(index, index + 1, 0).reshape([])
        new_row = new.slice_in_dim(index, index + 1, 0)
        buffer = buffer.dynamic_update_slice(new_row, [place, zero, start, zero])
    return buffer


def _lower_add_at(counts: Any, places: Any, added: Any) -> Any:
    from torch_xla.core import xla_builder as xb

    builder = counts.builder()
    for row in range(places.shape().sizes[0]):
        place = [
            xb.Op.scalar(builder, row, xb.Type.S32),
            places.slice_in_dim(row, row + 1, 0).reshape([]),
        ]
        more = added.slice_in_dim(row, row + 1, 0).reshape([1, 1])
        counts = counts.dynamic_update_slice(counts.dynamic_slice(place, (1, 1)) + more, place)
    return counts


def _lower_stretch(buffer: Any, row: Any, first: Any, *, rows: int, length: int) -> Any:
    from torch_xla.core import xla_builder as xb

    zero = xb.Op.zero(buffer.builder(), xb.Type.S32)
    _, heads, _, dim = buffer.shape().sizes
    return buffer.dynamic_slice([row, zero, first, zero], (rows, heads, length, dim))


def _lower_bitcast(x: Any, *, to: str) -> Any:
    from torch_xla.core import xla_builder as xb

    return x.bitcast(getattr(xb.Type, to))


@cache
def _onednn_computation(left: onednn.Shape, right: onednn.Shape) -> Any:
    from torch_xla.core import xla_builder as xb

    return xb.computation_from_module_proto("parallama_product", onednn.product(left, right))


@cache
def _registered(lower: Callable[..., Any]) -> Any:
    """The operation that a function of this module lowers. It keeps its computations by shape.

    A function made anew for each call would be another operation each time, and all would stay.
    """
    from torch_xla.core import xla_op_registry

    return xla_op_registry.register(lower.__name__.replace("_lower", "parallama", 1), lower)
