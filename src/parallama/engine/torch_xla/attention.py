"""Grouped-query attention for XLA, put into transformers' models through its attention interface.

KV heads are never repeated, and the cache is read as it is stored.

Shapes: `B` rows, `S` new positions, `T` cache length, `H` query heads, `K` KV heads, `G = H / K`,
`D` head dim, `M = G * S`.
"""

# Scores are contracted with `einsum`, which torch-xla lowers to one dot with batch dims `(B, K)`.
# `torch.matmul` would merge rows and heads into one dim; when both are split, GSPMD gathers the
# whole cache to do that.

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...plan.mesh_shape import DATA
from ..steps import CACHE_AXES
from . import block_attention
from .attention_products import mixture, row_maximum, scores
from .block_attention import HIDDEN
from .cache import LayerKV
from .mesh import DeviceMesh

PLAIN = "parallama"
CACHED = "parallama_cached"
STRETCH = 128
"""Queries of a prompt that are taken at a time on the CPU.

What causal attention need not compute is left out.
"""


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
    """Attention of new positions over the cache and themselves.

    It writes the new keys and values into the cache.

    Args:
        query: `[B, H, S, D]`.
        key, value: from `StepCache.update`; a position's place in the cache is its number.
        attention_mask: always None here; what is visible follows from `position_ids`.
        position_ids: `[B, S]`.

    Returns:
        `[B, S, H, D]` and no weights.
    """
    assert attention_mask is None
    mesh = key.cache.mesh
    batch, heads, new, dim = query.shape
    kv_heads = key.new.shape[1]
    by_group = (query * scaling).reshape(batch, kv_heads, heads // kv_heads, new, dim)
    if key.cached is None:
        at_a_time = STRETCH if mesh.backend.weights_first else new
        out = _over_all(
            [_among_new(mesh, by_group, key.new, value.new, sliding_window, at_a_time=at_a_time)]
        )
    elif key.cache.in_slots or (mesh.backend.weights_first and new > 1):
        among = _among_new(mesh, by_group, key.new, value.new, sliding_window, at_a_time=new)
        out = _over_all([_written(mesh, by_group, key, value, sliding_window), among])
    else:
        out = _with_cached(by_group, key, value, position_ids, sliding_window)
    by_head = out.to(query.dtype)
    key.cache.write(key.layer, key.new, value.new, after=by_head[:, :, 0])
    return by_head.reshape(batch, heads, new, dim).transpose(1, 2), None


@dataclass(frozen=True)
class _Mixture:
    """Attention over some of the places, before its softmax is divided by its sum.

    Attributes:
        mixed: values by weight, `[B, K, G, S, D]`.
        top: the highest score, `[B, K, G, S, 1]` fp32, which every weight is relative to.
        total: the sum of weights, like `top`.
    """

    mixed: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor


def _over_all(parts: Sequence[_Mixture]) -> torch.Tensor:
    """Attention over the places of all parts together, `[B, K, G, S, D]`."""
    if len(parts) == 1:
        return parts[0].mixed / parts[0].total
    top = functools.reduce(torch.maximum, [part.top for part in parts])
    scales = [torch.exp(part.top - top) for part in parts]
    mixed = [part.mixed * scale for part, scale in zip(parts, scales, strict=True)]
    totals = [part.total * scale for part, scale in zip(parts, scales, strict=True)]
    return functools.reduce(torch.add, mixed) / functools.reduce(torch.add, totals)


def _among_new(
    mesh: DeviceMesh,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    *,
    at_a_time: int,
) -> _Mixture:
    """Causal attention of positions over themselves.

    Args:
        query: scaled, `[B, K, G, S, D]`.
        key, value: `[B, K, S, D]`.
        at_a_time: queries of a stretch.
    """
    new = query.shape[3]
    places = torch.arange(new, device=query.device, dtype=torch.int32)
    parts = []
    for first in range(0, new, at_a_time):
        # A stretch sees nothing behind it, and nothing before the window of its first position.
        last = min(first + at_a_time, new)
        start = 0 if window is None else max(0, first - window + 1)
        seen = _causal(places[None, start:last], places[first:last, None], window)
        part = query[:, :, :, first:last]
        raw = torch.einsum("bkmd,bktd->bkmt", _merged(part), key[:, :, start:last])
        visible = seen[None].expand(part.shape[0], -1, -1)
        (weights,), top, total = _exponentials(mesh, [_masked(raw, visible, part.shape[2])])
        mixed = torch.einsum("bkmt,bktd->bkmd", weights.to(query.dtype), value[:, :, start:last])
        parts.append([tensor.reshape(*part.shape[:4], -1) for tensor in (mixed, top, total)])
    if len(parts) == 1:
        return _Mixture(*parts[0])
    return _Mixture(*(torch.cat(tensors, dim=3) for tensors in zip(*parts, strict=True)))


def _with_cached(
    query: torch.Tensor, key: LayerKV, value: LayerKV, positions: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Attention of positions over the cache and themselves, `[B, K, G, S, D]`.

    Args:
        query: scaled, `[B, K, G, S, D]`.
        positions: `[B, S]`.
    """
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
    raw_new = torch.einsum("bkmd,bksd->bkms", rows, key.new)
    scores_new = _masked(raw_new, seen[None].expand(batch, new, new), group)
    (old, fresh), _, total = _exponentials(mesh, [scores_old, scores_new])
    out_old = mixture(mesh, old.to(query.dtype), value.cached)
    out_new = torch.einsum("bkms,bksd->bkmd", fresh.to(query.dtype), value.new)
    return ((out_old + out_new) / total).reshape(query.shape)


def _written(
    mesh: DeviceMesh,
    query: torch.Tensor,
    key: LayerKV,
    value: LayerKV,
    window: int | None,
) -> _Mixture:
    """Attention of positions over what of the cache is in use.

    Args:
        query: scaled, `[B, K, G, S, D]`.
    """
    assert key.cached is not None and value.cached is not None
    rows, keys, values = (
        mesh.enter_manual(tensor, CACHE_AXES)
        for tensor in (_merged(query), key.cached, value.cached)
    )
    starts = mesh.enter_manual(key.cache.visible, (DATA,))
    row = key.cache.first_row()
    parts = block_attention.attend(
        mesh, rows, keys, values, row, starts, new=query.shape[3], window=window
    )
    shape = query.shape[:4]
    whole = (*shape[:2], shape[2] * shape[3])
    left = [mesh.leave_manual(part, CACHE_AXES, (*whole, part.shape[3])) for part in parts]
    return _Mixture(*(part.reshape(*shape, -1) for part in left))


def _merged(query: torch.Tensor) -> torch.Tensor:
    """`[B, K, G, S, D]` -> `[B, K, M, D]`."""
    return query.flatten(2, 3)


def _causal(key: torch.Tensor, query: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a key's place may be seen from a query's."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _exponentials(
    mesh: DeviceMesh, parts: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Softmax over several parts together, not divided yet.

    Args:
        parts: fp32 scores, `[..., T_i]`.

    Returns:
        Weights `[..., T_i]`, the highest score and the sum of weights, `[..., 1]` each.
    """
    tops = [row_maximum(mesh, part) for part in parts]
    top = functools.reduce(torch.maximum, tops)
    weights = [torch.exp(part - top) for part in parts]
    sums = [part.sum(-1, keepdim=True) for part in weights]
    return weights, top, functools.reduce(torch.add, sums)


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
    """Attention without a cache of ours, under transformers' own mask.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, K, T, D]`.
        attention_mask: bool `[B, 1, S, T]`, true where visible; None for plain causal attention
            over `T = S`.

    Returns:
        `[B, S, H, D]` and no weights.
    """
    batch, heads, new, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    scaled = query * (dim**-0.5 if scaling is None else scaling)
    rows = scaled.reshape(batch, kv_heads, group * new, dim)
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
    """Hide what must not be seen; the result is fp32.

    Args:
        raw: scores, `[B, K, M, T]`.
        visible: `[B, S, T]`.
    """
    batch, new, length = visible.shape
    mask = visible[:, None]
    if new > 1:
        mask = mask[:, :, None].expand(batch, 1, group, new, length)
        mask = mask.reshape(batch, 1, group * new, length)
    return torch.where(mask, raw.float(), torch.full((), HIDDEN, device=raw.device))


def register() -> None:
    """Make both functions known to transformers, under `PLAIN` and `CACHED`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(PLAIN, plain_attention)
    AttentionInterface.register(CACHED, cached_attention)
    # Only PLAIN has masks of transformers' making; CACHED knows what is visible from the positions.
    AttentionMaskInterface.register(PLAIN, sdpa_mask)
