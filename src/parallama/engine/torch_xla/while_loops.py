"""Loops within a program: a body that is traced once, run as often as a device's number says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .mesh import DeviceMesh
from .traced_body import TracedBody, computed

Body = Callable[
    [torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]
]


def repeat(
    mesh: DeviceMesh,
    times: torch.Tensor,
    body: Body,
    given: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """`state`, after `body` was run so many times, by each device as its own `times` says.

    XLA computes what depends neither on the round nor on the state before the loop, and also where
    the body is never run: `branches.when` skips that, too.

    Args:
        times: int32 scalar.
        body: from the number of the round (int32 scalar), `given` and the state to the next state,
            of the same shapes and dtypes; see `TracedBody`.
        given: what the body reads besides.
    """
    from torch_xla.core import xla_builder as xb

    round_ = mesh.enter_manual(torch.zeros((), dtype=torch.int32, device=times.device), ())
    first_state = 1 + len(given)
    end = first_state + len(state)
    traced = TracedBody(
        mesh,
        lambda tensors: body(tensors[0], tensors[1:first_state], tensors[first_state:]),
        [round_, *given, *state],
    )

    def lower(*operands: Any) -> Any:
        def left(times: Any, number: Any, *_: Any) -> Any:
            return number < times

        def run(times: Any, number: Any, *rest: Any) -> Any:
            operands = [number, *rest]
            following = number + xb.Op.one(number.builder(), xb.Type.S32)
            states = traced.call(operands)
            return times, following, *operands[1:first_state], *states, *operands[end:]

        loop = xb.Op.mkwhile(operands, left, run)
        return xb.Op.tuple([loop.get_tuple_element(1 + index) for index in range(first_state, end)])

    return computed("parallama_repeat", lower, [times, *traced.operands])
