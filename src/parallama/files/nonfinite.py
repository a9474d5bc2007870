"""Weights that hold NaN or infinity: a damaged or diverged model, whose every answer is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def refuse(name: str, part: torch.Tensor, file: str) -> None:
    """Raise `CheckpointError` if a tensor, or a part of it, holds a number that is not finite.

    Args:
        name: of the tensor.
        file: that it is from.
    """
    if is_finite(part):
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


def finite_only(
    tensors: Iterator[tuple[str, torch.Tensor]], file_of: Callable[[str], str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors by name, up to one that `refuse` refuses."""
    for name, tensor in tensors:
        refuse(name, tensor, file_of(name))
        yield name, tensor
