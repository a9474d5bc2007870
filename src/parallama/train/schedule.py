"""The learning rate of every step: warm-up, then cosine, linear or constant. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate that depends on the step alone.

    Attributes:
        kind: how it falls after the warm-up. `cosine` is that of Loshchilov and Hutter, 2017
            (SGDR), without restarts.
        peak: its largest value.
        steps: optimizer steps that it is drawn over. Later ones have the rate of the last.
        warmup: steps in which it rises linearly. Step `warmup` is the first at the peak.
        floor: what it falls to, as a share of the peak.
    """

    kind: Kind = "cosine"
    peak: float
    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """The learning rate of a step; the first is step 0."""
        step = min(step, self.steps - 1)
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return self.peak
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        left = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.peak * (self.floor + (1 - self.floor) * left)
