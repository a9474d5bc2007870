"""A prompt's step computes what only the next token needs at only one position a row: from the last layer's attention on, nothing but a row's last position is read.

Shapes: `B` rows, `S` new positions, `E` hidden, `F` any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...plan.mesh_shape import DATA
from .mesh import DeviceMesh
from .products import ADDITIONS


class LastPositions(TorchFunctionMode):
    """While a step is traced: the product with `weight` takes only one position of each row, and so does all that it is added to.

    Args:
        weight: `o_proj` of the last layer.
        ends: `[B, S]` bool, true at the position of each row; a row without one comes out as zeros.
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
        elif (
            function in ADDITIONS
            and len({_shape(argument)[1] for argument in args if len(_shape(argument)) == 3}) > 1
        ):
            # What is added to lies whole on every device; nothing after this says so of all positions.
            args = [
                self._narrowed(self._mesh.mark(argument, (DATA, None, None)))
                if _shape(argument)[:2] == self._ends.shape
                else argument
                for argument in args
            ]
        return function(*args, **(kwargs or {}))

    def _narrowed(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S, F]` -> `[B, 1, F]`."""
        return torch.where(
            self._ends[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device)
        ).sum(1, keepdim=True)


def _shape(argument: Any) -> tuple[int, ...]:
    return tuple(argument.shape) if isinstance(argument, torch.Tensor) else ()
