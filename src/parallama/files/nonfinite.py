"""Weights that hold NaN or infinity: a damaged or diverged model, whose every answer is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import torch

from ..errors import CheckpointError, lines

_PIECE = 1 << 20


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or infinite.

    One pass at the speed of a sum, without a copy.
    """
    # A sum is finite only if all its terms are. Finite terms may overflow: then each is looked at.
    return bool(torch.isfinite(tensor.sum())) or count_nonfinite(tensor) == 0


def count_nonfinite(tensor: torch.Tensor) -> int:
    """How many numbers are NaN or infinite."""
    return sum(int((~torch.isfinite(piece)).sum()) for piece in tensor.reshape(-1).split(_PIECE))


def is_finite_in(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether finite numbers stay so when they are cast: larger ones would become infinite."""
    if tensor.numel() == 0 or torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return True
    ends = torch.stack(tensor.aminmax())
    return bool(torch.isfinite(ends.to(dtype)).all())


def refuse(name: str, part: torch.Tensor, file: str, dtype: torch.dtype | None = None) -> None:
    """Raise `CheckpointError` if a tensor, or a part of it, holds a number that is not finite.

    Args:
        name: of the tensor.
        file: that it is from.
        dtype: that it is cast to; what becomes infinite there is not finite either.
    """
    if is_finite(part):
        if dtype is not None and not is_finite_in(part, dtype):
            _refuse_cast(name, part, file, dtype)
        return
    count = count_nonfinite(part)
    raise CheckpointError(
        lines(
            f"{file}: tensor {name} holds NaN or infinity "
            f"({count} of {part.numel()} numbers that were read)",
            "expected finite weights",
            "--allow-nonfinite (allow_nonfinite=True) loads them all the same",
        )
    )


def _refuse_cast(name: str, part: torch.Tensor, file: str, dtype: torch.dtype) -> NoReturn:
    pieces = part.reshape(-1).split(_PIECE)
    count = sum(count_nonfinite(piece.to(dtype)) for piece in pieces)
    own, to = (str(each).removeprefix("torch.") for each in (part.dtype, dtype))
    raise CheckpointError(
        lines(
            f"{file}: tensor {name} holds {own} numbers that are infinity in {to} "
            f"({count} of {part.numel()} numbers that were read)",
            f"expected weights within {torch.finfo(dtype).max:.3g}",
            "--allow-nonfinite (allow_nonfinite=True) loads them all the same",
        )
    )


def finite_only(
    tensors: Iterator[tuple[str, torch.Tensor]],
    file_of: Callable[[str], str],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors by name, up to one that `refuse` refuses."""
    for name, tensor in tensors:
        refuse(name, tensor, file_of(name), dtype)
        yield name, tensor
