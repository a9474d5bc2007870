"""The transformers model of a config: without weights, or whole, as it runs by itself."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..errors import CheckpointError, cause, lines
from ..model.spec import ModelSpec
from .checkpoint import Checkpoint


def make_skeleton(config: Any) -> Any:
    """The transformers causal LM on the meta device; only its rotary table is computed.

    It has a config of its own: what runs it names its attention there.

    Raises:
        CheckpointError: no model can be built of the config.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        skeleton.eval()
        skeleton.model.rotary_emb = type(skeleton.model.rotary_emb)(config=config)
    except Exception as error:  # what modules raise at values that transformers' config lets pass
        raise CheckpointError(
            lines(
                f"config: transformers builds no model of it: "
                f"{type(error).__name__}: {cause(error)}"
            )
        ) from None
    return skeleton


def to_host(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The transformers causal LM with a checkpoint's weights, on the host, with eager attention.

    It is what a user runs without this package.
    """
    spec = ModelSpec.from_config(checkpoint.config)
    model = make_skeleton(checkpoint.config)
    model.set_attn_implementation("eager")
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors(spec)}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    # `spec.parameters()` is what transformers' model has.
    assert not unexpected
    assert missing == (["lm_head.weight"] if spec.tied else []), missing
    model.tie_weights()
    return model
