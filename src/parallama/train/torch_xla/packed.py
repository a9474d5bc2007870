"""Attention within the documents that are packed into a row, for training.

It has no cache, and needs no mask tensor of transformers. Shapes: `B` rows, `S` positions, `H`
query heads, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

from typing import Any

import torch

PACKED = "parallama_packed"
_HIDDEN = -1e30


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    documents: torch.Tensor,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents: `[B, H, S, D]` over `[B, K, S, D]`.

    Args:
        attention_mask: always None here; what is visible follows from `documents`.
        documents: `[B, S]`, which document a position belongs to.

    Returns:
        `[B, S, H, D]` and no weights.
    """
    assert attention_mask is None  # transformers makes none for an attention of this name
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    rows = (query * scaling).reshape(batch, kv_heads, (heads // kv_heads) * length, dim)
    places = torch.arange(length, device=query.device)
    causal = places[None, :] <= places[:, None]
    visible = causal[None] & (documents[:, :, None] == documents[:, None, :])
    if sliding_window is not None:
        visible = visible & (places[None, :] > places[:, None] - sliding_window)
    raw = torch.matmul(rows, key.transpose(2, 3)).float().unflatten(2, (-1, length))
    hidden = torch.full((), _HIDDEN, device=raw.device)
    weights = torch.softmax(torch.where(visible[:, None, None], raw, hidden), dim=-1)
    out = torch.matmul(weights.to(query.dtype).flatten(2, 3), value)
    return out.reshape(batch, heads, length, dim).transpose(1, 2), None


def register() -> None:
    """Make it known to transformers, under `PACKED`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
