"""Operations that torch-xla has no good lowering for, written on XLA's own builder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch

from . import onednn


def row_update(buffer: torch.Tensor, new: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Row `r` of `new` goes to `buffer[r]` at `starts[r]` along dim 2: one plain dynamic-update-slice a row.

    Args:
        buffer: `[B, K, T, D]`.
        new: `[B, K, S, D]`.
        starts: `[B]` int32.
    """
    return _registered("parallama_row_update", _lower_row_update)(buffer, new, starts)


def stretch(buffer: torch.Tensor, first: torch.Tensor, length: int) -> torch.Tensor:
    """`buffer[:, :, first : first + length]` for a place that only the device knows, an int32 scalar; `[B, K, T, D]`."""
    return _registered("parallama_stretch", _lower_stretch)(buffer, first, length=length)


def onednn_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[..., O, E]` x `[..., E, N]` -> `[..., O, N]` of fp32 by oneDNN, on XLA:CPU only. Where devices share the work both are each device's own part (`DeviceMesh.enter_manual`)."""
    import torch_xla

    computation = _onednn_computation(tuple(left.shape), tuple(right.shape))
    return torch_xla._XLAC._xla_user_computation(
        "xla::_op_parallama_onednn_product", [left, right], computation
    )[0]


def float_bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of fp32 numbers as int32 (`x.view(torch.int32)`, for which torch-xla would go through the host)."""
    return _registered("parallama_float_bits", _lower_float_bits)(x)


def float_of_bits(bits: torch.Tensor) -> torch.Tensor:
    """What `float_bits` was given."""
    return _registered("parallama_float_of_bits", partial(_lower_bits_as, "F32"))(bits)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of 16-bit floats as int16; other tensors as they are. XLA:CPU would move such floats between devices as fp32."""
    return _registered("parallama_as_bits", _lower_as_bits)(x) if x.dtype in _SIXTEEN_BITS else x


def of_bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `as_bits` was given."""
    return (
        _registered(f"parallama_bits_as_{_SIXTEEN_BITS[dtype]}", _LOWER_OF_BITS[dtype])(x)
        if dtype in _SIXTEEN_BITS
        else x
    )


def optimization_barrier(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, which XLA's simplifier doesn't look through."""
    import torch_xla

    torch_xla._XLAC._xla_optimization_barrier_([x])
    return x


def barrier_together(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors themselves, none of which XLA computes with before all are there; nothing behind is found equal to what stood before."""
    import torch_xla

    held = [tensor.detach().clone() for tensor in tensors]
    torch_xla._XLAC._xla_optimization_barrier_(held)
    return tuple(held)


def held_until(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`x`, which XLA doesn't have before `other` is there, and doesn't take for the same as `x` anywhere else. Both must be finite, or the result isn't.

    A barrier is gone before XLA looks for equal values for the last time; a product with 0 is not simplified away, since it might be no number.
    """
    return x + other.detach().flatten()[:1].to(x.dtype) * 0


@contextmanager
def scope(name: str) -> Iterator[None]:
    """What is traced within carries this name into the HLO, if torch-xla's debug metadata is on (`backends.dump_programs`)."""
    import torch_xla

    inside = torch_xla._XLAC.profiler.scope_pusher(name)
    try:
        yield
    finally:
        del inside


def name_scopes(module: torch.nn.Module, prefix: str) -> None:
    """From here on every submodule's forward is traced within a scope of its name."""
    names = {part: f"{prefix}.{name}" if name else prefix for name, part in module.named_modules()}
    entered: list[AbstractContextManager[None]] = []

    def enter(part: torch.nn.Module, _arguments: Any) -> None:
        entered.append(scope(names[part]))
        entered[-1].__enter__()

    def leave(_part: torch.nn.Module, _arguments: Any, _result: Any) -> None:
        entered.pop().__exit__(None, None, None)

    for part in names:
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave, always_call=True)


def _lower_row_update(buffer: Any, new: Any, starts: Any) -> Any:
    from torch_xla.core import xla_builder as xb

    builder = buffer.builder()
    zero = xb.Op.zero(builder, xb.Type.S32)
    for row in range(buffer.shape().sizes[0]):
        index = [
            xb.Op.scalar(builder, row, xb.Type.S32),
            zero,
            starts.slice_in_dim(row, row + 1, 0).reshape([]),
            zero,
        ]
        buffer = buffer.dynamic_update_slice(new.slice_in_dim(row, row + 1, 0), index)
    return buffer


def _lower_stretch(buffer: Any, first: Any, *, length: int) -> Any:
    from torch_xla.core import xla_builder as xb

    zero = xb.Op.zero(buffer.builder(), xb.Type.S32)
    batch, heads, _, dim = buffer.shape().sizes
    return buffer.dynamic_slice([zero, zero, first, zero], (batch, heads, length, dim))


def _lower_float_bits(x: Any) -> Any:
    from torch_xla.core import xla_builder as xb

    return x.bitcast(xb.Type.S32)


def _lower_as_bits(x: Any) -> Any:
    from torch_xla.core import xla_builder as xb

    return x.bitcast(xb.Type.S16)


def _lower_bits_as(kind: str, x: Any) -> Any:
    from torch_xla.core import xla_builder as xb

    return x.bitcast(getattr(xb.Type, kind))


_SIXTEEN_BITS = {torch.bfloat16: "BF16", torch.float16: "F16"}
_LOWER_OF_BITS = {dtype: partial(_lower_bits_as, kind) for dtype, kind in _SIXTEEN_BITS.items()}


@cache
def _onednn_computation(left: onednn.Shape, right: onednn.Shape) -> Any:
    from torch_xla.core import xla_builder as xb

    return xb.computation_from_module_proto("parallama_product", onednn.product(left, right))


@cache
def _registered(name: str, lower: Callable[..., Any]) -> Any:
    from torch_xla.core import xla_op_registry

    return xla_op_registry.register(name, lower)
