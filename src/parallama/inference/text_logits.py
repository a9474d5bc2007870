"""Logits of texts that are run at once, without a state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engine.steps import LOGITS_AXES, StepKey
from ..errors import UsageError, lines
from ..plan.program_shapes import CHUNK, chunk_size
from . import state
from .run_stats import RunStats
from .sharded_model import ShardedModel


def text_logits(
    model: ShardedModel, texts: Sequence[Sequence[int]], most: int
) -> tuple[torch.Tensor, RunStats]:
    """Logits of every position, `[B, S, V]` fp32 on the host, and what was compiled for them.

    Args:
        texts: `B` of them, of `S` tokens each.
        most: tokens that a text may have.

    Raises:
        UsageError: they are of unequal length or over the limit.
    """
    length, shards = len(texts[0]), model.mesh.shape.data
    if any(len(text) != length for text in texts):
        raise UsageError(
            lines("the sequences have different lengths", "expected one length, or a call for each")
        )
    if length > most:
        raise UsageError(
            lines(
                f"a sequence of {length} tokens is over the limit of {most}",
                f"expected at most {most}",
            )
        )
    rows = -(-len(texts) // shards) * shards
    size = chunk_size(length) if length <= CHUNK else -(-length // CHUNK) * CHUNK
    padded = torch.zeros(rows, size, dtype=torch.long)
    padded[: len(texts), :length] = torch.tensor(texts)
    arguments = state.text_arguments(model.steps, padded, None, longest=length)
    key = StepKey(kind="logits", batch=rows, length=0, new=size, fresh=True)
    with model.mesh.counted() as compiled:
        model.programs.warm_up([key], model.report("compiling"))
        stats = RunStats(programs_compiled=compiled())
        out = model.programs[key](arguments)["logits"]
    whole = model.mesh.fetch(out, LOGITS_AXES)
    return whole[: len(texts), :length, : model.plan.model.vocab], stats
