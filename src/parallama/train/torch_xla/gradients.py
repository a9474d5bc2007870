"""Sums of gradients over the micro-steps of an optimizer step, on each device's own part."""

from __future__ import annotations

import torch

from ...engine.torch_xla.ordering import all_there, barrier


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
            gradient = barrier(self.sums[name] + gradient)
        self.sums[name] = gradient

    def all_there(self, one: torch.Tensor) -> torch.Tensor | None:
        """A number `[1]` that depends on every sum so far; None if there is none.

        Args:
            one: see `ordering.all_there`.
        """
        return all_there(self.sums.values(), one) if self.sums else None
