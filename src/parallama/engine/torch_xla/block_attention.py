"""Attention over the written part of a cache, block by block, in a loop within the program.

One program serves a prompt of any length, and yet a chunk of it costs what it sees, not what the
buffer could hold. The softmax is kept running over the blocks (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022).

Shapes: `B` rows of the cache, `R` rows of the step, `K` KV heads, `M` query rows of a KV head,
group by group (`M = G * S`), `S` new positions, `T` cache length, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...plan.program_shapes import BLOCK
from .attention_products import mixture_in_part, row_maximum, scores_in_part
from .mesh import DeviceMesh
from .ops import stretch
from .while_loops import repeat

HIDDEN = -1e30
"""A score of what must not be seen."""


def attend(
    mesh: DeviceMesh,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    row: torch.Tensor,
    starts: torch.Tensor,
    *,
    new: int,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of new positions over the places of the cache before them.

    Where devices share the work, all tensors are each device's own part.

    Args:
        query: scaled, `[R, K, M, D]`.
        keys, values: `[B, K, T, D]`.
        row: int32 scalar, the row of keys and values that the first query row stands for.
        starts: `[R]` int32; a row sees the places before its start.
        new: `S`.
        window: how far back a position sees, itself included.

    Returns:
        The mixture of values `[R, K, M, D]`, not divided yet, the highest score and the sum of
        weights, `[R, K, M, 1]` each; all fp32. A row that sees nothing has `HIDDEN` as its highest
        score: what it is merged with takes its weight to zero.
    """
    rows, length = query.shape[0], keys.shape[2]
    block = min(BLOCK, length)

    def body(
        number: torch.Tensor, given: Sequence[torch.Tensor], state: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        query, keys, values, row, starts = given
        mixed, top, total = state
        asked = number * block
        # The last block may begin earlier. Of it only what is left is seen.
        first = torch.clamp(asked, max=length - block)
        place = first + torch.arange(block, dtype=torch.int32, device=query.device)
        start = starts[:, None, None, None]
        seen = (place >= asked) & (place < start)
        if window is not None:
            queries = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
            position = start + queries[:, None] % new
            seen = seen & (place > position - window)
        block_keys = stretch(keys, row, rows, first, block)
        raw = scores_in_part(mesh, query, block_keys).float()
        scores = torch.where(seen, raw, torch.full((), HIDDEN, device=raw.device))
        higher = torch.maximum(top, row_maximum(mesh, scores))
        weights = torch.exp(scores - higher)
        kept = torch.exp(top - higher)
        block_values = stretch(values, row, rows, first, block)
        added = mixture_in_part(mesh, weights.to(query.dtype), block_values)
        return mixed * kept + added, higher, total * kept + weights.sum(-1, keepdim=True)

    # Zeros made of a device's own part: a constant would not be the device's own.
    nothing = query.float() * 0
    column = nothing[..., :1]
    blocks = (starts.amax(0) + (block - 1)) // block
    given, state = [query, keys, values, row, starts], [nothing, column + HIDDEN, column]
    mixed, top, total = repeat(mesh, blocks.int(), body, given, state)
    return mixed, top, total
