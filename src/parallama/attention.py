"""Grouped-query attention for XLA, put into transformers' models through its attention interface.

Scores are contracted with `einsum`, which torch-xla lowers to one dot with batch dims `(B, K)`: `torch.matmul` would merge rows and heads
into one dim, and when both are split GSPMD gathers the whole cache to do that. KV heads are never repeated.

Shapes: `B` rows, `S` new positions, `T` cache length, `H` query heads, `K` KV heads, `G = H / K`, `D` head dim, `M = G * S`.
"""

from __future__ import annotations

from typing import Any

import torch

from .cache import LayerKV
from .products import mixture, scores

PLAIN = "parallama"
CACHED = "parallama_cached"
_HIDDEN = -1e30


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: LayerKV,
    value: LayerKV,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    position_ids: torch.Tensor,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of new positions over the cache and themselves; writes the new keys and values into the cache.

    Args:
        query: `[B, H, S, D]`.
        key, value: from `StepCache.update`; a position's place in the cache is its number.
        attention_mask: always None here; what is visible follows from `position_ids`.
        position_ids: `[B, S]`.

    Returns:
        `[B, S, H, D]` and no weights.
    """
    assert attention_mask is None
    batch, heads, new, dim = query.shape
    kv_heads = key.new.shape[1]
    group = heads // kv_heads
    rows = (query * scaling).reshape(batch, kv_heads, group * new, dim)

    among = torch.arange(new, device=query.device)
    seen = among[None, None, :] <= among[None, :, None]
    if sliding_window is not None:
        seen = seen & (among[None, None, :] > among[None, :, None] - sliding_window)
    scores_new = _masked(torch.einsum("bkmd,bksd->bkms", rows, key.new), seen.expand(batch, new, new), group)
    if key.cached is None or value.cached is None:
        weights = torch.softmax(scores_new, dim=-1).to(query.dtype)
        out = torch.einsum("bkms,bksd->bkmd", weights, value.new)
    else:
        mesh = key.cache.mesh
        places = torch.arange(key.cached.shape[2], device=query.device)
        start = position_ids[:, :1, None]
        visible = places[None, None, :] < start
        if sliding_window is not None:
            visible = visible & (places[None, None, :] > position_ids[:, :, None] - sliding_window)
        else:
            visible = visible.expand(batch, new, places.shape[0])
        scores_old = _masked(scores(mesh, rows, key.cached), visible, group)
        top = torch.maximum(scores_old.amax(-1, keepdim=True), scores_new.amax(-1, keepdim=True))
        old, fresh = torch.exp(scores_old - top), torch.exp(scores_new - top)
        total = old.sum(-1, keepdim=True) + fresh.sum(-1, keepdim=True)
        out = mixture(mesh, old.to(query.dtype), value.cached)
        out = out + torch.einsum("bkms,bksd->bkmd", fresh.to(query.dtype), value.new)
        out = (out / total).to(query.dtype)
    by_head = out.reshape(batch, kv_heads, group, new, dim)
    key.cache.write(key.layer, key.new, value.new, after=by_head[:, :, 0])
    return by_head.reshape(batch, heads, new, dim).transpose(1, 2), None


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention without a cache of ours: `[B, H, S, D]` queries over `[B, K, T, D]` keys and values, under transformers' own mask.

    Args:
        attention_mask: bool `[B, 1, S, T]`, true where visible; None for plain causal attention over `T = S`.

    Returns:
        `[B, S, H, D]` and no weights.
    """
    batch, heads, new, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = (query * (dim**-0.5 if scaling is None else scaling)).reshape(batch, kv_heads, group * new, dim)
    if attention_mask is None:
        places = torch.arange(length, device=query.device)
        seen = (places[None, :] <= places[length - new :, None]).expand(batch, new, length)
    else:
        seen = attention_mask[:, 0].expand(batch, new, length)
    raw = torch.einsum("bkmd,bktd->bkmt", rows, key)
    weights = torch.softmax(_masked(raw, seen, group), dim=-1).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    out = torch.einsum("bkmt,bktd->bkmd", weights, value)
    return out.reshape(batch, heads, new, dim).transpose(1, 2), None


def _masked(raw: torch.Tensor, visible: torch.Tensor, group: int) -> torch.Tensor:
    """Hide what must not be seen: scores `[B, K, G*S, T]`, visible `[B, S, T]`; the result is fp32."""
    batch, new, length = visible.shape
    if new == 1:
        mask = visible[:, None]
    else:
        mask = visible[:, None, None].expand(batch, 1, group, new, length).reshape(batch, 1, group * new, length)
    return torch.where(mask, raw.float(), torch.full((), _HIDDEN, device=raw.device))


def register() -> None:
    """Make both functions known to transformers, under `PLAIN` and `CACHED`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(PLAIN, plain_attention)
    AttentionInterface.register(CACHED, cached_attention)
    # Only PLAIN has masks of transformers' making; CACHED knows what is visible from the positions.
    AttentionMaskInterface.register(PLAIN, sdpa_mask)
