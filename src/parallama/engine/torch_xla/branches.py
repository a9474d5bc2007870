"""Branches within a program: a body that is skipped while it runs unless a device's number says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .mesh import DeviceMesh
from .traced_body import TracedBody, computed

Body = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def when(
    mesh: DeviceMesh,
    asked: torch.Tensor,
    body: Body,
    given: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """What `body` makes of `state` where `asked`, else `state` itself; each device decides.

    Args:
        asked: bool scalar.
        body: from `given` and the state to the next state, of the same shapes and dtypes; see
            `TracedBody`.
        given: what the body reads besides.
    """
    from torch_xla.core import xla_builder as xb

    first = len(given)
    end = first + len(state)
    traced = TracedBody(
        mesh, lambda tensors: body(tensors[:first], tensors[first:]), [*given, *state]
    )

    def lower(asked: Any, *operands: Any) -> Any:
        def run(*operands: Any) -> Any:
            return xb.Op.tuple(traced.call(operands))

        def keep(*operands: Any) -> Any:
            return xb.Op.tuple(operands[first:end])

        return asked.mkconditional(operands, run, keep)

    return computed("parallama_when", lower, [asked, *traced.operands])
