"""What a plan costs: bytes on each device, and what a step must read and compute at the least. Pure arithmetic, all of it predicted.

Every device holds as many bytes as every other. Shapes by the letters of docs/design.md; here `b` is the rows of one device, `ceil(B / data)`, and `H`, `K`, `F`,
`V` are one device's share after head layout and padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..model.spec import ModelSpec
from .placement import Plan
from .program_shapes import CHUNK, chunk_size, prompt_buckets

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device while a batch runs.

    Attributes:
        params: weights.
        kv: the KV cache at its full length.
        growth: the KV cache at the length before, held beside the full one while it grows; 0 if it never does.
        activations: intermediate tensors at their peak.
        logits: fp32 logits of the rows' last positions.
    """

    params: int
    kv: int
    growth: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The peak: a step's intermediate tensors are gone while the cache grows."""
        return self.params + self.kv + max(self.growth, self.activations + self.logits)


def memory(plan: Plan, *, batch: int, prompt: int, max_model_len: int, itemsize: int) -> Memory:
    """Bytes on each device to continue `batch` prompts of up to `prompt` tokens to `max_model_len` positions.

    The cache's lengths and the prefill's chunks are those of `buckets`.
    """
    lengths = prompt_buckets(max_model_len, prompt, rows=batch)
    chunk = chunk_size(prompt)
    visible = chunk if prompt <= CHUNK else lengths[0] + chunk
    prefill = activation_bytes(plan, batch, chunk, visible, itemsize)
    decode = activation_bytes(plan, batch, 1, lengths[-1] + 1, itemsize)
    return Memory(
        params=plan.parameter_bytes(itemsize)[0],
        kv=plan.cache_bytes(batch, lengths[-1], itemsize)[0],
        growth=plan.cache_bytes(batch, lengths[-2], itemsize)[0] if len(lengths) > 1 else 0,
        activations=max(prefill, decode),
        logits=local_rows(plan, batch) * plan.vocab // plan.mesh.model * _FP32,
    )


def activation_bytes(plan: Plan, batch: int, new: int, visible: int, itemsize: int) -> int:
    """Peak bytes of intermediate tensors on each device in one layer, over `new` positions that see `visible` ones; layers take turns.

    The larger of what is alive at attention's softmax, `b S (E + (2 H + 2 K) D)` numbers and the scores `b H S T` in fp32 and as weights in the plan's dtype,
    and at the MLP's product, `b S (2 E + 3 F)`. Counted from the steps of `attention.cached_attention` and of transformers' MLP, each result once; XLA may fuse
    some away.
    """
    model, split = plan.model, plan.mesh.model
    queries, slots, inner = (
        len(plan.head_layout.query_sources) // split,
        plan.head_layout.slots // split,
        plan.intermediate // split,
    )
    tokens = local_rows(plan, batch) * new
    attention = tokens * (
        model.hidden + (2 * queries + 2 * slots) * model.head_dim
    ) * itemsize + tokens * queries * visible * (_FP32 + itemsize)
    return max(attention, tokens * (2 * model.hidden + 3 * inner) * itemsize)


def local_rows(plan: Plan, batch: int) -> int:
    """`b`: rows are filled up to a multiple of the "data" axis."""
    return math.ceil(batch / plan.mesh.data)


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the model as in its checkpoint; a tied head counts once."""
    return sum(math.prod(shape) for _, shape in spec.parameters())


def shown_bytes(count: int) -> str:
    """`8.03 GB`, `25.2 MB`, `1,234 B`: decimal units."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e4)):
        if count >= size:
            return (
                f"{count / (1e3 if unit == 'kB' else size):.3g} {unit}"
                if count < 1e15
                else f"{count / 1e12:,.0f} TB"
            )
    return f"{count:,} B"


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
    """FLOPs of the products of a prefill of `length` tokens a row: causal attention, layers at every position but what comes after the last layer's attention, that and the head at the last position."""
    _, head = _weights(spec)
    last = f"model.layers.{spec.layers - 1}."
    at_the_end = sum(
        math.prod(shape)
        for name, shape in spec.parameters()
        if name.startswith((f"{last}self_attn.o_proj.", f"{last}mlp."))
    )
    return (
        _layers_flops(spec, batch, length)
        - batch * 2 * at_the_end * (length - 1)
        + batch * 2 * head
    )


def _layers_flops(spec: ModelSpec, batch: int, length: int) -> int:
    """Of all layers at every position, and causal attention."""
    inside, _ = _weights(spec)
    attention = 2 * spec.layers * spec.query_heads * spec.head_dim * length * (length + 1)
    return batch * (2 * inside * length + attention)


def train_flops(spec: ModelSpec, batch: int, length: int) -> int:
    """FLOPs of the products of one forward and backward pass over full rows: three times those of a forward pass with the head at every position. Nothing computed twice counts twice."""
    _, head = _weights(spec)
    return 3 * (_layers_flops(spec, batch, length) + batch * length * 2 * head)
