"""From a model's name to a sharded model: a folder, a `.gguf` file, a hub id or a shipped name.

Tensors go to the devices in parts (see `stream`), so the host never holds a second full copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.interface import Engine, Steps
from ..files.checkpoint import Checkpoint
from ..files.skeleton import make_skeleton
from ..model.dtype_names import unknown_dtype
from ..plan.placement import Plan
from . import stream
from .device_weights import DeviceWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint on the devices.

    Attributes:
        skeleton: transformers' model without weights.
        stats: what reading it took.
    """

    skeleton: Any
    weights: DeviceWeights
    dtype: torch.dtype
    stats: stream.StreamStats

    def steps(self) -> Steps:
        """The steps of inference on these weights."""
        weights = self.weights
        return weights.mesh.steps(self.skeleton, weights.plan, weights.tensors, self.dtype)


def resolve_dtype(name: str, config: Any, backend: str) -> torch.dtype:
    """`auto` is the checkpoint's own dtype, but float32 on the CPU backend.

    bfloat16 products are emulated there, and slower.

    Raises:
        UsageError: no such dtype.
    """
    if name == "auto":
        own = getattr(config, "dtype", None)
        own = getattr(torch, own, None) if isinstance(own, str) else own
        return (
            own
            if isinstance(own, torch.dtype) and own in DTYPES.values() and backend != "cpu"
            else torch.float32
        )
    if name not in DTYPES:
        raise unknown_dtype(name, ["auto", *DTYPES])
    return DTYPES[name]


def to_devices(
    checkpoint: Checkpoint,
    plan: Plan,
    mesh: Engine,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> Loaded:
    """Read a checkpoint's tensors and put each on the devices as the plan says.

    Raises:
        CheckpointError: a tensor is damaged, or holds NaN or infinity where that isn't allowed.
    """
    sources = checkpoint.sources(plan.model)
    skeleton = make_skeleton(checkpoint.config)  # first: it costs little, and may refuse the config
    weights, stats = stream.put(
        sources, plan, mesh, dtype, progress, allow_nonfinite=allow_nonfinite
    )
    return Loaded(skeleton=skeleton, weights=weights, dtype=dtype, stats=stats)
