"""Low-rank adapters: how they begin, their dropout, merging, and saving them as PEFT does.

They are those of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ...files.disk import Disk
from ...plan.mesh_shape import MODEL
from ...plan.placement import Blocks
from ..layout import TrainingPlan
from ..options import LoraOptions

_PREFIX = "base_model.model."
_MIX = (0x7FEB352D, 0x846CA68B)


def initial(plan: TrainingPlan, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Adapters as PEFT begins them, the same for a seed on every mesh.

    `lora_A` is uniform, as `torch.nn.Linear` draws its weight; `lora_B` is zero.
    """
    for name in plan.adapters:
        shape = tuple(int(size) for size in plan[name].source_shape)
        if name.endswith("lora_B.weight"):
            yield name, torch.zeros(shape)
            continue
        generator = torch.Generator().manual_seed(_number(f"{seed} {name}"))
        bound = 1 / math.sqrt(shape[1])
        yield name, torch.empty(shape).uniform_(-bound, bound, generator=generator)


def merge(
    weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, options: LoraOptions
) -> torch.Tensor:
    """A weight `[O, E]` that does what a weight and its adapter do together.

    Args:
        weight: `[O, E]`.
        low: `[R, E]`, `lora_A`.
        high: `[O, R]`, `lora_B`.
    """
    return weight + options.scale * (high @ low)


def save_adapter(
    folder: Path,
    adapters: Iterable[tuple[str, torch.Tensor]],
    options: LoraOptions,
    base_model: str,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    PEFT's `PeftModel.from_pretrained` loads them.

    Args:
        folder: made if it isn't there.
        adapters: from `Trainer.adapters`.
        base_model: name of the model that they belong to.
    """
    from safetensors.torch import save

    disk = Disk()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in adapters}
    disk.replace(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": list(options.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    disk.replace(folder / "adapter_config.json", json.dumps(config, indent=2).encode() + b"\n")


class Dropout:
    """Dropout of adapters' inputs.

    What is dropped is a hash of seed, micro-step, module, row, position and feature of the whole
    batch. So it is the same on every mesh, after a resume, and when a layer is run again for its
    backward pass.

    Args:
        count: `[1]`, the number of the micro-step.
        data_rank, model_rank: `[1]` int64, the device's place along each axis.
    """

    def __init__(
        self,
        share: float,
        seed: int,
        count: torch.Tensor,
        data_rank: torch.Tensor,
        model_rank: torch.Tensor,
        plan: TrainingPlan,
    ) -> None:
        self._share, self._seed, self._count = share, seed, count.to(torch.int64)
        self._data_rank, self._model_rank, self._plan = data_rank, model_rank, plan

    def __call__(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """`[B, S, E]`, each device's own part."""
        rows, length, features = x.shape
        weight = f"{module}.weight"
        places = [torch.arange(size, device=x.device) for size in x.shape]
        row, column = places[0] + self._data_rank * rows, places[2]
        if self._plan[weight].axes[1] == MODEL:
            column = column + self._model_rank * features
        blocks = self._plan.blocks(weight)
        if blocks is not None and blocks.dim == 1:
            column = _source(column, blocks)
        position = row[:, None] * length + places[1]
        start = self._count + _number(f"{self._seed} {module}") % (1 << 31)
        bits = _mixed(_mixed(_mixed(start)[:, None, None] + position[..., None]) + column)
        kept = bits >= int(self._share * (1 << 32))
        nothing = torch.zeros((), dtype=x.dtype, device=x.device)
        return torch.where(kept, x / (1 - self._share), nothing)


def _source(column: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The checkpoint's feature of each placed one."""
    table = torch.tensor([max(source, 0) for source in blocks.sources], device=column.device)
    return table[column // blocks.block] * blocks.block + column % blocks.block


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Good bits from a count, in `[0, 2^32)`, as int64.

    This is the 32-bit finalizer "lowbias32" of Chris Wellons' hash prospector.
    """
    mask = (1 << 32) - 1
    x = x & mask
    x = x ^ (x >> 16)
    x = (x * _MIX[0]) & mask
    x = x ^ (x >> 15)
    x = (x * _MIX[1]) & mask
    return x ^ (x >> 16)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
