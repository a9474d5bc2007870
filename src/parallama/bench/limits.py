"""What a step must read and compute at the least, from the model's sizes. Pure."""

from __future__ import annotations

import math

from ..spec import ModelSpec


def _weights(spec: ModelSpec) -> tuple[int, int]:
    """Elements of the layers' parameters and final norm, and of the head."""
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    inside = sum(math.prod(shape) for name, shape in spec.parameters() if name not in outside)
    return inside, spec.vocab * spec.hidden


def decode_bytes(spec: ModelSpec, batch: int, length: int, itemsize: int) -> int:
    """Bytes that one decode step must read: every weight once (of an untied embedding only the rows looked up), and `length` cached positions a row."""
    inside, head = _weights(spec)
    cached = 2 * spec.layers * spec.kv_heads * spec.head_dim * batch * length
    return (inside + head + batch * spec.hidden + cached) * itemsize


def prefill_flops(spec: ModelSpec, batch: int, length: int) -> int:
    """FLOPs of the products of a prefill of `length` tokens a row: layers at every position, causal attention, the head at the last position."""
    inside, head = _weights(spec)
    attention = 2 * spec.layers * spec.query_heads * spec.head_dim * length * (length + 1)
    return batch * (2 * inside * length + attention + 2 * head)
