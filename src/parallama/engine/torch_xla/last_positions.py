"""In a prompt's step, what only the next token needs is computed at one position a row.

From the last layer's attention on, nothing but a row's last position is read.

Shapes: `B` rows, `S` new positions, `E` hidden, `F` any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .linear_form import ADDITIONS
from .mesh import DeviceMesh


class LastPositions(TorchFunctionMode):
    """While a step is traced: one linear takes one position of each row.

    So does all that its result is added to.

    Args:
        weight: of the linear, `o_proj` of the last layer.
        ends: `[B, S]` bool, true at the position of each row. A row without one comes out as zeros.
    """

    def __init__(self, mesh: DeviceMesh, weight: torch.Tensor, ends: torch.Tensor) -> None:
        super().__init__()
        self._mesh = mesh
        self._weight = weight
        self._ends = ends

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.nn.functional.linear and args[1] is self._weight:
            args = (self._narrowed(args[0]), *args[1:])
        elif function in ADDITIONS and len(set(map(_positions, args)) - {None}) > 1:
            args = [self._fitted(argument) for argument in args]
        return function(*args, **(kwargs or {}))

    def _fitted(self, argument: Any) -> Any:
        """An argument of an addition whose other one has one position a row."""
        if not isinstance(argument, torch.Tensor) or argument.shape[:2] != self._ends.shape:
            return argument
        # It is whole on every device; nothing after this says so of all positions.
        return self._narrowed(self._mesh.mark_rows(argument))

    def _narrowed(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, F]` -> `[B, 1, F]`."""
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        return torch.where(self._ends[..., None], x, zero).sum(1, keepdim=True)


def _positions(argument: Any) -> int | None:
    """`S` of a tensor `[B, S, F]`; None of anything else."""
    if isinstance(argument, torch.Tensor) and argument.dim() == 3:
        return int(argument.shape[1])
    return None
