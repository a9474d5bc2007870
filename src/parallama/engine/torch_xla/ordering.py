"""What makes XLA compute in an order, keep values apart, and update donated buffers in place.

XLA sees a graph without time in it. It computes equal values once and keeps the result, computes a
cheap value anew in everything that reads it, and copies a donated buffer that it may still have to
read. Two things tell it otherwise. An optimization barrier is opaque to its simplifier, but gone
before it looks for equal values for the last time. A product with 0 stays to the end: the other
factor might be NaN. Each function here has one purpose and is made of one of the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import ProgramError, lines, listed

TRIGONOMETRIC = {torch.Tensor.cos, torch.Tensor.sin, torch.cos, torch.sin}
"""What transformers computes once a step, for `kept_apart`.

XLA:CPU would compute it again for every head of every layer.
"""
SUM_ROWS = 8
"""Rows of a product that stands for a sum; a product of one row XLA would make a sum again."""
_ORDERS = 4
"""Times that outputs are put in another order before it is given up."""


# -- before and after


def barrier(x: torch.Tensor) -> torch.Tensor:
    """`x` itself; XLA's simplifier doesn't look through it. Changes the tensor in place."""
    import torch_xla

    torch_xla._XLAC._xla_optimization_barrier_([x])
    return x


def barrier_all(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors themselves; XLA computes with none of them before all are there."""
    import torch_xla

    held = [tensor.detach().clone() for tensor in tensors]
    torch_xla._XLAC._xla_optimization_barrier_(held)
    return tuple(held)


def after(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """`x`, not before `first` is there, and not taken for the same `x` elsewhere.

    Both must be finite, or the result isn't.
    """
    return x + first.detach().flatten()[:1].to(x.dtype) * 0


def each_after(first: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, element by element not before the same element of `first`, of their shape.

    The order holds on every device without a collective, however the tensors are split.
    """
    order = first * 0
    return [tensor + order for tensor in tensors]


def all_there(tensors: Iterable[torch.Tensor], one: torch.Tensor) -> torch.Tensor:
    """A number `[1]` fp32 that is only there when every one of these fp32 tensors is.

    A product makes it. A sum would be fused into everything that waits for it, and read hundreds
    of tensors anew each time.

    Args:
        one: `[1]` fp32, from `one_unknown_to_xla`.
    """
    firsts = torch.stack([each.flatten()[0] for each in tensors])
    return (firsts.expand(SUM_ROWS, -1) @ one.expand(firsts.shape[0], SUM_ROWS))[0, :1]


def one_unknown_to_xla(number: torch.Tensor) -> torch.Tensor:
    """The number 1, `[1]` fp32, made of any number that is at least 0.

    XLA turns a product with ones that it knows back into a sum.
    """
    return (number.flatten()[:1] >= 0).float()


@contextmanager
def unchained(device: torch.device) -> Iterator[None]:
    """An all-gather within waits for no other, and no later one waits for it.

    torch-xla chains all-gathers by a token, which would keep each result alive until the next one,
    also where nobody needs it.
    """
    import torch_xla

    torch_xla._XLAC._set_all_reduce_token(str(device), None)
    yield
    torch_xla._XLAC._set_all_reduce_token(str(device), None)


# -- not computed twice


def kept_apart(x: torch.Tensor) -> torch.Tensor:
    """`[..., D]`, itself, as a product with the identity, which is exact.

    XLA:CPU doesn't compute a product anew in everything that reads it.
    """
    return torch.matmul(x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))


# -- buffers updated in place


def read_backwards(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A first element of each tensor, the last tensor's first: `[n]`.

    As a step's first output it fixes the order in which donated buffers are read, see
    `order_outputs`. Updates that depend on it come after the buffers' last reading; for an update
    that might come before, XLA would copy the buffer.
    """
    return torch.cat([tensor.flatten()[:1] for tensor in reversed(tensors)])


def order_outputs(
    program: str,
    outputs: Mapping[str, torch.Tensor],
    donated: Collection[str],
    by_buffer: Mapping[int, str],
) -> tuple[list[str], list[str | None], list[Any]]:
    """Put a step's outputs in the order in which XLA pairs them with donated buffers.

    XLA pairs donated buffers with outputs of the same shape in the order of the graph's parameters.
    Any other order would cross the pairs and copy every buffer. The order of parameters follows
    from that of the outputs: the graph is walked from the first output on.

    Args:
        program: for messages.
        donated: names of arguments that come out under the same names.
        by_buffer: handle of every argument's buffer to its name.

    Returns:
        The outputs' names in order. Then what the graph reads, in order: arguments by name, None
        for other buffers. Then those buffers.

    Raises:
        ProgramError: a donated argument isn't read or doesn't come out, or no order fits.
    """
    import torch_xla

    xlac: Any = torch_xla._XLAC
    others = [name for name in outputs if name not in donated]
    before = names = list(outputs)
    for _ in range(_ORDERS):
        _, values = xlac._get_tensors_xla_device_data_node([outputs[name] for name in names])
        read = [by_buffer.get(handle) for handle in xlac._get_tensors_handle(values)]
        kept = [name for name in read if name is not None and name in donated]
        missing = [name for name in donated if name not in outputs or name not in kept]
        if missing:
            raise ProgramError(
                lines(
                    f"program {program}: {listed(missing)} donated but not read or not returned",
                    "expected donated arguments that come out under their own names",
                )
            )
        if others + kept == names:
            return names, read, values
        before, names = names, others + kept
    crossed = sorted(name for name, other in zip(before, names, strict=True) if name != other)
    raise ProgramError(
        lines(
            f"program {program}: its outputs have no order in which the buffers of "
            f"{listed(crossed)} are read",
            "expected donated arguments that can be paired with the outputs of their names",
            "give it a first output that reads them all",
        )
    )
