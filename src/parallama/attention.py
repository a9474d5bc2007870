"""Grouped-query attention for XLA, put into transformers' models through its attention interface.

Scores are contracted with `einsum`, which torch-xla lowers to one dot with batch dims `(B, K)`: `torch.matmul` would merge rows and heads
into one dim, and when both are split GSPMD gathers the whole cache to do that. KV heads are never repeated.

Shapes: `B` rows, `S` new positions, `T` cache length, `H` query heads, `K` KV heads, `G = H / K`, `D` head dim, `M = G * S`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .cache import LayerKV
from .mesh import DeviceMesh
from .products import mixture, scores

PLAIN = "parallama"
CACHED = "parallama_cached"
STRETCH = 128
"""Queries of a prompt that are taken at a time; see `_stretch`."""
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
    by_group = (query * scaling).reshape(batch, kv_heads, heads // kv_heads, new, dim)
    if key.cached is None or value.cached is None:
        out = _among_new(key.cache.mesh, by_group, key.new, value.new, sliding_window)
    else:
        out = _with_cached(by_group, key, value, position_ids, sliding_window)
    by_head = out.to(query.dtype)
    key.cache.write(key.layer, key.new, value.new, after=by_head[:, :, 0])
    return by_head.reshape(batch, heads, new, dim).transpose(1, 2), None


def _among_new(mesh: DeviceMesh, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention of positions over themselves: `[B, K, G, S, D]` scaled queries, `[B, K, S, D]` keys and values -> `[B, K, G, S, D]`."""
    new = query.shape[3]
    places = torch.arange(new, device=query.device, dtype=torch.int32)
    outs = []
    for first in range(0, new, _stretch(mesh, new)):
        # Nothing behind the stretch is seen by it, nor what is before the window of its first position.
        last = min(first + _stretch(mesh, new), new)
        start = 0 if window is None else max(0, first - window + 1)
        seen = _causal(places[None, start:last], places[first:last, None], window)
        part = query[:, :, :, first:last]
        raw = torch.einsum("bkmd,bktd->bkmt", _merged(part), key[:, :, start:last])
        weights, total = _exponentials([_masked(raw, seen[None].expand(part.shape[0], -1, -1), part.shape[2])])
        outs.append((torch.einsum("bkmt,bktd->bkmd", weights[0].to(query.dtype), value[:, :, start:last]) / total).reshape(part.shape))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)


def _with_cached(query: torch.Tensor, key: LayerKV, value: LayerKV, positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """Attention of positions `[B, S]` over the cache and themselves; `[B, K, G, S, D]` scaled queries -> the same shape."""
    assert key.cached is not None and value.cached is not None
    mesh, rows = key.cache.mesh, _merged(query)
    batch, _, group, new, _ = query.shape
    among = torch.arange(new, device=query.device, dtype=torch.int32)
    places = torch.arange(key.cached.shape[2], device=query.device, dtype=torch.int32)
    at = positions.int()
    visible = places[None, None, :] < at[:, :1, None]
    if window is not None:
        visible = visible & (places[None, None, :] > at[:, :, None] - window)
    seen = _causal(among[None, :], among[:, None], window)
    scores_old = _masked(scores(mesh, rows, key.cached), visible.expand(batch, new, -1), group)
    scores_new = _masked(torch.einsum("bkmd,bksd->bkms", rows, key.new), seen[None].expand(batch, new, new), group)
    (old, fresh), total = _exponentials([scores_old, scores_new])
    out = mixture(mesh, old.to(query.dtype), value.cached) + torch.einsum("bkms,bksd->bkmd", fresh.to(query.dtype), value.new)
    return (out / total).reshape(query.shape)


def _stretch(mesh: DeviceMesh, new: int) -> int:
    """So many queries at a time: on the CPU, what causal attention need not compute is left out."""
    return STRETCH if mesh.backend.weights_first else new


def _merged(query: torch.Tensor) -> torch.Tensor:
    """`[B, K, G, S, D]` -> `[B, K, M, D]`."""
    return query.flatten(2, 3)


def _causal(key: torch.Tensor, query: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a key's place may be seen from a query's."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _exponentials(parts: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Softmax over several parts together, not divided yet: fp32 scores `[..., T_i]` -> weights `[..., T_i]`, and their sum `[..., 1]`."""
    tops = [part.amax(-1, keepdim=True) for part in parts]
    top = functools.reduce(torch.maximum, tops)
    weights = [torch.exp(part - top) for part in parts]
    return weights, functools.reduce(torch.add, [part.sum(-1, keepdim=True) for part in weights])


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
