"""What a plan costs: bytes on each device, and what a step must at least read and compute. Pure.

All of it is predicted. Every device holds as many bytes as every other. Shapes by the letters of
docs/design.md; here `b` is the rows of one device, and `H`, `K`, `F`, `V` are its share after head
layout and padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..model.spec import ModelSpec
from .placement import Plan
from .program_shapes import BLOCK, SLOT_CHUNKS, run_slots, slot_length

_FP32 = _INT32 = 4
_LAST_TOKEN = 16
"""Of a slot: the last token (int64), its log-probability (fp32), the next position (int32)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device while requests run on slots.

    Attributes:
        params: weights.
        kv: the KV cache of all slots.
        state: what slots have besides: how often each token came, and the last one.
        activations: intermediate tensors at their peak.
        logits: fp32 logits of the rows' last positions.
    """

    params: int
    kv: int
    state: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it together, at the peak."""
        return self.params + self.kv + self.state + self.activations + self.logits


def memory(plan: Plan, *, batch: int, max_model_len: int, itemsize: int) -> Memory:
    """Bytes on each device to run `batch` requests at a time, of up to `max_model_len` tokens.

    The slots are those that `generate` makes.
    """
    length = slot_length(max_model_len)
    return slot_memory(plan, slots=run_slots(batch), length=length, itemsize=itemsize)


def slot_memory(
    plan: Plan, *, slots: int, length: int, itemsize: int, chunk: int = SLOT_CHUNKS[-1]
) -> Memory:
    """Bytes on each device with a cache of so many slots.

    Args:
        length: positions of a slot, from `slot_length`.
        chunk: most positions of a prompt at a time.
    """
    block = min(BLOCK, length)
    vocab = plan.vocab // plan.mesh.model
    prefill = activation_bytes(plan, plan.mesh.data, chunk, block + chunk, itemsize)
    decode = activation_bytes(plan, slots, 1, block + 1, itemsize)
    return Memory(
        params=plan.parameter_bytes(itemsize)[0],
        kv=plan.cache_bytes(slots, length, itemsize)[0],
        state=plan.local_rows(slots) * (vocab * (_INT32 + _FP32) + _LAST_TOKEN) + vocab * _FP32,
        activations=max(prefill, decode),
        logits=plan.local_rows(slots) * vocab * _FP32,
    )


def activation_bytes(plan: Plan, batch: int, new: int, visible: int, itemsize: int) -> int:
    """Peak bytes of intermediate tensors on each device, in one layer; layers take turns.

    It is the larger of two. Attention's softmax has `b S (E + (2 H + 2 K) D)` numbers, and the
    scores `b H S T` in fp32 and as weights in the plan's dtype. The MLP's product has
    `b S (2 E + 3 F)`. Both are counted from the steps of `attention.cached_attention` and of
    transformers' MLP, each result once; XLA may fuse some away.

    Args:
        new: `S`, positions of each row.
        visible: `T`, positions that each of them sees.
    """
    model, split = plan.model, plan.mesh.model
    queries = len(plan.head_layout.query_sources) // split
    kv_heads, inner = plan.head_layout.slots // split, plan.intermediate // split
    tokens = plan.local_rows(batch) * new
    numbers = model.hidden + (2 * queries + 2 * kv_heads) * model.head_dim
    scores = queries * visible * (_FP32 + itemsize)
    attention = tokens * (numbers * itemsize + scores)
    return max(attention, tokens * (2 * model.hidden + 3 * inner) * itemsize)


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the model as in its checkpoint; a tied head counts once."""
    return sum(math.prod(shape) for _, shape in spec.parameters())


def shown_bytes(count: int) -> str:
    """`8.03 GB`, `25.2 MB`, `1,234 B`: decimal units."""
    if count < 10_000:
        return f"{count:,} B"
    for unit, size in (("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if count < 999.5 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e12:,.0f} TB"


def decode_bytes(spec: ModelSpec, batch: int, length: int, itemsize: int) -> int:
    """Bytes that one decode step must read.

    That is every weight once (of an untied embedding only the rows looked up), and `length` cached
    positions for each row.
    """
    layers, head = _weights(spec)
    cached = 2 * spec.layers * spec.kv_heads * spec.head_dim * batch * length
    return (layers + head + batch * spec.hidden + cached) * itemsize


def prefill_flops(spec: ModelSpec, batch: int, length: int) -> int:
    """FLOPs of the products of a prefill of `length` tokens a row, with causal attention.

    What comes after the last layer's attention, and the head, are needed at the last position only.
    """
    _, head = _weights(spec)
    last = f"model.layers.{spec.layers - 1}."
    at_the_end = sum(
        math.prod(shape)
        for name, shape in spec.parameters()
        if name.startswith((f"{last}self_attn.o_proj.", f"{last}mlp."))
    )
    left_out = 2 * at_the_end * (length - 1)
    return _layers_flops(spec, batch, length) + batch * (2 * head - left_out)


def train_flops(spec: ModelSpec, batch: int, length: int) -> int:
    """FLOPs of the products of one forward and backward pass over full rows.

    Three times those of a forward pass with the head at every position. What is computed again
    does not count twice.
    """
    _, head = _weights(spec)
    return 3 * (_layers_flops(spec, batch, length) + batch * length * 2 * head)


def _layers_flops(spec: ModelSpec, batch: int, length: int) -> int:
    """Of all layers at every position, with causal attention."""
    layers, _ = _weights(spec)
    attention = 2 * spec.layers * spec.query_heads * spec.head_dim * length * (length + 1)
    return batch * (2 * layers * length + attention)


def _weights(spec: ModelSpec) -> tuple[int, int]:
    """Elements of the layers' parameters with the final norm, and of the head."""
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    layers = sum(math.prod(shape) for name, shape in spec.parameters() if name not in outside)
    return layers, spec.vocab * spec.hidden
