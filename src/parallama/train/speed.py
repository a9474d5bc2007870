"""How fast a training step is, and which share of the machine's speed that is."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..model.spec import ModelSpec
from ..plan.cost import train_flops


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a step computes, and what the machine could compute.

    Attributes:
        flops: of one step: the products of a forward and a backward pass, without recomputation.
        peak_flops_per_s: of all devices; None where it is not known.
    """

    flops: int
    peak_flops_per_s: float | None

    @classmethod
    def of(cls, spec: ModelSpec, sequences: int, seq_len: int, backend: str) -> Speed:
        """For steps of so many sequences.

        Virtual devices share the host's cores, so their peak is what the cores reach in a large
        product.
        """
        return cls(
            flops=train_flops(spec, sequences, seq_len),
            peak_flops_per_s=host_flops_per_s() if backend == "cpu" else None,
        )

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilization (Chowdhery et al., 2022, "PaLM") of a step of that duration."""
        if self.peak_flops_per_s is None:
            return None
        return self.flops / seconds / self.peak_flops_per_s


def host_flops_per_s(size: int = 1024) -> float:
    """FLOPs a second of a product of two float32 square matrices on the host: best of three."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        _ = a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)
