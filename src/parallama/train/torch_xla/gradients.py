"""Sums of gradients over the micro-steps of an optimizer step, on each device's own part."""

from __future__ import annotations

import torch

from ...engine.torch_xla.ops import optimization_barrier
from .weights import SUMMED


class Gradients:
    """Sums of gradients by parameter name, in float32.

    Each has the shape of the device's part of the weight, all-gathered over "data".
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add a micro-step's gradient of a parameter."""
        gradient = gradient.float()
        if name in self.sums:
            # Without a barrier XLA would add them up only where the sum is used, and keep every
            # micro-step's gradients until then.
            gradient = optimization_barrier(self.sums[name] + gradient)
        self.sums[name] = gradient

    def all_there(self, one: torch.Tensor) -> torch.Tensor | None:
        """A number `[1]` that depends on every sum so far; None if there is none.

        It comes from a product with several rows. XLA would compute a sum anew in everything that
        waits for it, each time from hundreds of tensors.

        Args:
            one: `[1]` fp32, the number 1, which XLA must not know.
        """
        if not self.sums:
            return None
        first = torch.stack([each.flatten()[0] for each in self.sums.values()])
        return (first.expand(SUMMED, -1) @ one.expand(first.shape[0], SUMMED))[0, :1]
