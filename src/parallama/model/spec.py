"""What in a model's config matters for splitting it: sizes, biases, ties. Pure data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, lines, shown
from .agreement import check_agreement
from .rope import read_rope
from .unsupported import check_layers, read_family

_LIMITS = {
    "hidden_size": 1 << 20,
    "num_hidden_layers": 4096,
    "num_attention_heads": 65536,
    "num_key_value_heads": 65536,
    "head_dim": 65536,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 31,
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes of a Llama-family model, by the letters of docs/design.md.

    Attributes:
        hidden: `E`.
        layers: number of decoder layers.
        query_heads: `H`.
        kv_heads: `K`.
        head_dim: `D`.
        intermediate: `F`.
        vocab: `V`.
        max_positions: the longest sequence that the model was made for, or that its rotary
            embedding was stretched to, in tokens.
        tied: the head shares the embedding's weight.
        qkv_bias, output_bias, mlp_bias: which projections have biases.
        head_norms: queries and keys are normalised per head (Qwen3).
        rope: the rotary embedding, one of `rope.ROPE_TYPES`.
        tp_plan: transformers' `base_model_tp_plan`: module pattern to style.
    """

    model_type: str
    hidden: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    rope: str = "default"
    tp_plan: Mapping[str, str]

    @classmethod
    def from_config(cls, config: Any, origin: str = "config") -> ModelSpec:
        """Read a transformers config object or the dict of a config.json.

        Args:
            origin: what to call it in a message.

        Raises:
            CheckpointError: the model type, or what the config asks for, is not supported; or a
                size is missing or absurd.
        """
        values = dict(config) if isinstance(config, Mapping) else config.to_dict()
        family = read_family(values, origin)
        if isinstance(config, Mapping):
            check_agreement(values, family, origin)
        own_plan = getattr(config, "base_model_tp_plan", None)

        def size(name: str, default: int | None = None) -> int:
            value = values.get(name, family.defaults.get(name))
            value = default if value is None else value
            if type(value) is not int or not 1 <= value <= _LIMITS[name]:
                raise CheckpointError(
                    lines(
                        f"{origin}: {name} is {shown(value)}",
                        f"expected a whole number from 1 to {_LIMITS[name]}",
                    )
                )
            return value

        def switch(name: bool | str) -> bool:
            if isinstance(name, bool):
                return name
            value = values.get(name, family.defaults.get(name))
            if value is not None and not isinstance(value, bool):
                raise CheckpointError(
                    lines(f"{origin}: {name} is {shown(value)}", "expected true or false")
                )
            return bool(value)

        heads = size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(
                lines(
                    f"{origin}: num_attention_heads {heads} does not divide "
                    f"by num_key_value_heads {kv_heads}",
                    "expected a multiple: every KV head serves as many query heads",
                )
            )
        hidden, layers = size("hidden_size"), size("num_hidden_layers")
        head_dim = size("head_dim", max(1, hidden // heads))
        if head_dim % 2:
            raise CheckpointError(
                lines(
                    f"{origin}: head_dim is {head_dim}",
                    "expected an even number: rotary embedding rotates pairs",
                )
            )
        check_layers(values, family, layers, origin)
        positions = size("max_position_embeddings")
        rope = read_rope(values, head_dim=head_dim, positions=positions, origin=origin)
        reach = max(positions, rope.reach or 0)
        if reach > _LIMITS["max_position_embeddings"]:
            raise CheckpointError(
                lines(
                    f"{origin}: rope type {rope.kind!r} reaches {reach} positions",
                    f"expected at most {_LIMITS['max_position_embeddings']}",
                )
            )
        return cls(
            model_type=values["model_type"],
            hidden=hidden,
            layers=layers,
            query_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=size("intermediate_size"),
            vocab=size("vocab_size"),
            max_positions=reach,
            tied=switch("tie_word_embeddings"),
            qkv_bias=switch(family.qkv_bias),
            output_bias=switch(family.output_bias),
            mlp_bias=switch(family.mlp_bias),
            head_norms=family.head_norms,
            rope=rope.kind,
            tp_plan=dict(own_plan if own_plan is not None else family.tp_plan),
        )

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every parameter of the causal LM with its checkpoint shape; a tied head is not one."""
        query, kv = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            for name, out, inner, bias in (
                ("self_attn.q_proj", query, self.hidden, self.qkv_bias),
                ("self_attn.k_proj", kv, self.hidden, self.qkv_bias),
                ("self_attn.v_proj", kv, self.hidden, self.qkv_bias),
                ("self_attn.o_proj", self.hidden, query, self.output_bias),
                ("mlp.gate_proj", self.intermediate, self.hidden, self.mlp_bias),
                ("mlp.up_proj", self.intermediate, self.hidden, self.mlp_bias),
                ("mlp.down_proj", self.hidden, self.intermediate, self.mlp_bias),
            ):
                yield f"{layer}.{name}.weight", (out, inner)
                if bias:
                    yield f"{layer}.{name}.bias", (out,)
            if self.head_norms:
                yield f"{layer}.self_attn.q_norm.weight", (self.head_dim,)
                yield f"{layer}.self_attn.k_norm.weight", (self.head_dim,)
            yield f"{layer}.input_layernorm.weight", (self.hidden,)
            yield f"{layer}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)
