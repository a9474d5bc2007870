"""Texts that a model in training writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..files.checkpoint import Checkpoint
from ..files.skeleton import make_skeleton
from ..inference.llm import LLM
from ..plan.make_plan import make_plan
from ..sharded.device_weights import DeviceWeights, put_parameter
from ..sharded.stream import StreamStats
from .settings import TrainSettings

if TYPE_CHECKING:
    from .trainer import Trainer

_NOT_READ = StreamStats(
    seconds=0.0, bytes_read=0, largest_tensor_bytes=0, baseline_rss_bytes=0, peak_rss_bytes=0
)


def write_samples(
    trainer: Trainer, settings: TrainSettings, model: Checkpoint, tokenizer: Any
) -> list[dict[str, str]]:
    """What the model as it is makes of the prompts, greedily: `prompt` and `text` of each.

    The weights are placed for generation, beside those in training, and dropped again.
    """
    mesh = trainer.mesh
    plan = make_plan(trainer.plan.model, mesh.shape)
    tensors = {
        name: put_parameter(tensor, plan, mesh, name, torch.float32)
        for name, tensor in trainer.host_parameters()
    }
    llm = LLM(
        name=settings.model,
        skeleton=make_skeleton(model.config),
        weights=DeviceWeights(plan=plan, mesh=mesh, tensors=tensors),
        dtype=torch.float32,
        tokenizer=tokenizer,
        generation={"eos_token_id": getattr(model.config, "eos_token_id", None)},
        max_model_len=plan.model.max_positions,
        max_num_seqs=len(settings.sample_prompts),
        load_s=0.0,
        load_stats=_NOT_READ,
        source=model,
    )
    prompts = list(settings.sample_prompts)
    written = llm.generate(prompts, max_new_tokens=settings.sample_tokens, temperature=0.0)
    return [
        {"prompt": prompt, "text": each.text} for prompt, each in zip(prompts, written, strict=True)
    ]
