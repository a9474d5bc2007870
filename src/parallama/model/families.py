"""The families of models that are supported, as data. Pure.

A family belongs here if transformers' module tree has Llama's names and shapes: then its forward
runs as it is, without model code of ours. Tests hold every entry against the installed
transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Windows = Literal["none", "every layer", "layer types", "switched layer types"]

_ATTENTION_AND_MLP = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
_HEAD_NORMS = {"layers.*.self_attn.q_norm": "replicate", "layers.*.self_attn.k_norm": "replicate"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a `model_type` means.

    Attributes:
        architecture: the class of its causal LM, by which `architectures` calls it.
        tp_plan: transformers' `base_model_tp_plan`, styles by our names; for callers that have a
            config.json and no transformers at hand.
        defaults: what a config.json means where it is silent, as in transformers' config class.
        qkv_bias, output_bias, mlp_bias: whether these projections have biases, or the name of the
            config's switch for it.
        head_norms: queries and keys are normalised per head.
        windows: which layers see a sliding window only: none, every one if the config has a
            `sliding_window`, those that `layer_types` names, or those only if
            `use_sliding_window` is on.
        layers_without_rotary: the config's `no_rope_layers` say which layers have no rotary
            embedding.
    """

    architecture: str
    tp_plan: Mapping[str, str] = field(default_factory=lambda: dict(_ATTENTION_AND_MLP))
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    head_norms: bool = False
    windows: Windows = "none"
    layers_without_rotary: bool = False


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            architecture="LlamaForCausalLM",
            defaults={"max_position_embeddings": 2048},
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
        ),
        "mistral": Family(
            architecture="MistralForCausalLM",
            defaults={
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            windows="every layer",
        ),
        "ministral": Family(
            architecture="MinistralForCausalLM",
            defaults={
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            windows="layer types",
        ),
        "qwen2": Family(
            architecture="Qwen2ForCausalLM",
            defaults={
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
            },
            qkv_bias=True,
            windows="switched layer types",
        ),
        "qwen3": Family(
            architecture="Qwen3ForCausalLM",
            tp_plan=_ATTENTION_AND_MLP | _HEAD_NORMS,
            defaults={
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
            },
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            head_norms=True,
            windows="switched layer types",
        ),
        "smollm3": Family(
            architecture="SmolLM3ForCausalLM",
            defaults={
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "tie_word_embeddings": True,
            },
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
            windows="switched layer types",
            layers_without_rotary=True,
        ),
        "seed_oss": Family(
            architecture="SeedOssForCausalLM",
            defaults={
                "max_position_embeddings": 524288,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "attention_bias": True,
            },
            qkv_bias="attention_bias",
            output_bias="attention_out_bias",
            mlp_bias="mlp_bias",
        ),
    }
)
TP_PLANS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {name: family.tp_plan for name, family in FAMILIES.items()}
)
"""The tensor-parallel plan of each family."""

# Why a model that transformers has is none of ours. A family that is not named here, nor found by
# its config's keys (`unsupported`), is refused without a reason.
_REFUSED: Mapping[str, tuple[str, ...]] = {
    "mixture of experts": (
        *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"),
        *("gpt_oss", "llama4_text", "dbrx"),
    ),
    "query, key and value are one fused weight": (
        *("phi3", "gpt2", "gpt_neox", "gpt_bigcode", "falcon", "bloom", "mpt", "codegen"),
        *("persimmon", "baichuan", "internlm2", "qwen", "chatglm"),
    ),
    "gate and up are one fused weight": ("glm", "glm4"),
    "soft-capping of logits": ("gemma2",),
    "rotary embedding of a part of each head": ("phi", "stablelm", "nemotron"),
    "norms other than before attention and MLP": ("olmo2", "olmo3", "exaone4", "gemma3_text"),
    "layer norms without weights": ("olmo",),
    "attention and MLP side by side": ("cohere", "cohere2", "gptj"),
    "multipliers of embedding, residuals and logits": ("granite", "hyperclovax"),
    "an embedding that scales its output": ("gemma",),
}
REASONS: Mapping[str, str] = MappingProxyType(
    {name: reason for reason, names in _REFUSED.items() for name in names}
)
"""Model type -> why it is not supported."""
