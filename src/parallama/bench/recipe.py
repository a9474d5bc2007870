"""The plain torch-xla recipe, as a competent user who follows the guides writes it.

transformers' model, SPMD marks, one sync a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..engine.torch_xla import backends
from .peers import StaticPeer, load, next_token

Axes = tuple[str | None, ...]
_SPLIT: Mapping[str, Axes] = MappingProxyType(
    {
        "q_proj": ("model", None),
        "k_proj": ("model", None),
        "v_proj": ("model", None),
        "gate_proj": ("model", None),
        "up_proj": ("model", None),
        "o_proj": (None, "model"),
        "down_proj": (None, "model"),
        "lm_head": ("model", None),
    }
)
"""Module to the mesh axis of each dim of its weight `[out, in]`; all else is replicated."""


class Recipe(StaticPeer):
    """Lazy tensors: every step is traced, and `torch_xla.sync()` runs it.

    torch-xla finds the program again by the trace's hash. Positions are on the devices, where
    transformers' `StaticCache` keeps them, so no step makes a new program. Where heads do not
    divide over the devices the answer is still right; GSPMD then gathers.

    Args:
        model: see `peers.load`.
        devices: virtual CPU devices, the `model` axis of the mesh; without SPMD if 1.
        dtype: of weights and cache.
        threads: torch's; XLA has its own.

    Raises:
        FitError: this process already runs another device count.
        CheckpointError: see `peers.load`.
    """

    def __init__(self, model: str, devices: int, dtype: torch.dtype, threads: int) -> None:
        torch.set_num_threads(threads)
        backends.start("cpu", devices)
        import numpy as np
        import torch_xla
        import torch_xla.distributed.spmd as xs

        self._xla: Any = torch_xla
        self._spmd: Any = xs
        self._device: torch.device = torch_xla.device()
        self._devices = devices
        self._dtype = dtype
        self._mesh: Any = None
        if devices > 1:
            self._mesh = xs.Mesh(np.arange(devices), (devices,), ("model",))
        self._model = load(model, dtype).to(self._device)
        self._model.tie_weights()  # moving it gave a tied head a copy
        for name, module in self._model.named_modules():
            axes = _SPLIT.get(name.rpartition(".")[2])
            if axes is not None:
                self._mark(module.weight, axes)
        torch_xla.sync(wait=True)
        self._call: Callable[[torch.Tensor], torch.Tensor] = self._forward

    def prepare(self, batch: int, prompt: int, steps: int) -> None:
        """Allocate the cache on the devices, and compile prefill and decode.

        It is `[B, K, T, D]`, split over KV heads where they divide.
        """
        self._make_room(batch, prompt, steps)
        config = self._model.config
        kv_heads = config.num_key_value_heads
        self._cache.early_initialization(
            batch, kv_heads, config.head_dim, self._dtype, self._device
        )
        if kv_heads % self._devices == 0:
            for layer in self._cache.layers:
                self._mark(layer.keys, (None, "model", None, None))
                self._mark(layer.values, (None, "model", None, None))
        self._xla.sync(wait=True)
        self._warm_up()

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> list[int]:
        if ids.device != self._device:
            ids = ids.to(self._device)
            # Unmarked, dynamo takes every prompt for a new layout and traces again.
            self._mark(ids, (None, None))
        self._token = self._call(ids)
        self._xla.sync()
        return self._token.tolist()

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        return next_token(self._model, ids, self._cache)

    def _mark(self, tensor: torch.Tensor, axes: Axes) -> None:
        if self._mesh is not None:
            self._spmd.mark_sharding(tensor, self._mesh, axes)


class RecipeOpenXLA(Recipe):
    """`Recipe` with its step through `torch.compile(backend="openxla")`.

    That traces once a shape and then only runs the program.
    """

    def __init__(self, model: str, devices: int, dtype: torch.dtype, threads: int) -> None:
        super().__init__(model, devices, dtype, threads)
        self._call = torch.compile(self._forward, backend="openxla", dynamic=False)
