"""What a config asks for that is not supported: refused with the reason. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, lines, shown
from .families import FAMILIES, REASONS, Family

PLAIN_WEIGHTS = "expected plain weights: float32, bfloat16 or float16"
ATTENTION_TYPES = ("full_attention", "sliding_attention")
"""What a layer can attend to, by transformers' names."""

# Reason to keys of a config.json, each of which asks for more than Llama's module tree can hold.
# Null, false and a count of 0 or 1 ask for nothing.
_FEATURES: Mapping[str, tuple[str, ...]] = {
    "mixture of experts": (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_experts_per_tok",
    ),
    "soft-capping of logits": (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attn_logit_softcap",
        "logits_soft_cap",
    ),
    "latent attention": ("kv_lora_rank",),
    "clipped queries, keys and values": ("clip_qkv",),
    "encoder and decoder": ("is_encoder_decoder",),
    "attention in both directions": ("use_bidirectional_attention",),
    "images or sound beside text": ("vision_config", "audio_config"),
    "sizes that differ between layers": ("per_layer_config", "block_configs"),
}


def read_family(values: Mapping[str, Any], origin: str) -> Family:
    """The family of a config.

    Raises:
        CheckpointError: there is none, or the config asks for what it doesn't have.
    """
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        reason = None
        if isinstance(model_type, str):
            reason = REASONS.get(model_type) or unsupported_feature(values)
        why = f": {reason}" if reason else ""
        raise CheckpointError(
            lines(
                f"model_type {shown(model_type)} is not supported{why}",
                f"expected one of {', '.join(sorted(FAMILIES))}",
                _meant_family(values),
            )
        )
    for key in ("quantization_config", "quantization", "compression_config"):
        if values.get(key) is not None:
            raise CheckpointError(lines(f"{origin} has a {key}", PLAIN_WEIGHTS))
    reason = unsupported_feature(values)
    if reason is not None:
        key = next(key for key in _FEATURES[reason] if _asks(values.get(key)))
        raise CheckpointError(
            lines(
                f"{origin}: {key} is {shown(values[key])}: {reason} is not supported",
                f"expected a plain {model_type} model",
            )
        )
    if values.get("is_causal") is False:
        raise CheckpointError(
            lines(
                f"{origin}: is_causal is False",
                "expected a model whose tokens see those before them only",
            )
        )
    return family


def _meant_family(values: Mapping[str, Any]) -> str:
    """Where only `architectures` says what a model is: the type that it stands for."""
    named = values.get("architectures")
    if values.get("model_type") is None and isinstance(named, list):
        for model_type, family in FAMILIES.items():
            if family.architecture in named:
                return f"set model_type to {model_type!r}: architectures is {shown(named)}"
    return ""


def unsupported_feature(values: Mapping[str, Any]) -> str | None:
    """The first feature that a config asks for and no family here has."""
    for reason, keys in _FEATURES.items():
        if any(_asks(values.get(key)) for key in keys):
            return reason
    return None


def check_layers(values: Mapping[str, Any], family: Family, layers: int, origin: str) -> None:
    """Raise `CheckpointError` unless single layers are as the family's modules have them."""
    window = values.get("sliding_window", family.defaults.get("sliding_window"))
    if family.windows == "switched layer types" and not values.get("use_sliding_window"):
        window = None
    elif family.windows != "none":
        _check_window(window, family, origin)
    kinds = values.get("layer_types")
    if kinds is not None:
        _check_list(kinds, "layer_types", ATTENTION_TYPES, layers, origin)
        allowed = _allowed_types(family, window)
        wrong = next((kind for kind in kinds[:layers] if kind not in allowed), None)
        if wrong is not None:
            raise CheckpointError(
                lines(
                    f"{origin}: layer_types has {shown(wrong)}",
                    f"expected {' or '.join(allowed)}, for this model type and sliding_window",
                )
            )
    if family.layers_without_rotary:
        _check_rotary_layers(values, layers, origin)


def _check_window(window: Any, family: Family, origin: str) -> None:
    # transformers' Ministral makes its masks for windows whether a layer has one or not.
    needed = family.windows == "layer types"
    if window is None and not needed:
        return
    if type(window) is not int or not 1 <= window < 1 << 31:
        raise CheckpointError(
            lines(
                f"{origin}: sliding_window is {shown(window)}",
                f"expected {'' if needed else 'null or '}a whole number of at least 1",
            )
        )


def _allowed_types(family: Family, window: int | None) -> tuple[str, ...]:
    full, sliding = ATTENTION_TYPES
    if window is None or family.windows == "none":
        return (full,)
    return (sliding,) if family.windows == "every layer" else ATTENTION_TYPES


def _check_rotary_layers(values: Mapping[str, Any], layers: int, origin: str) -> None:
    """`no_rope_layers` says 1 of a layer with rotary embedding; without it every n-th has none."""
    rotary = values.get("no_rope_layers")
    if rotary is not None:
        _check_list(rotary, "no_rope_layers", (0, 1), layers, origin)
        return
    interval = values.get("no_rope_layer_interval", 4)
    if type(interval) is not int or interval < 1:
        raise CheckpointError(
            lines(
                f"{origin}: no_rope_layer_interval is {shown(interval)}",
                "expected a whole number of at least 1",
            )
        )


def _check_list(value: Any, name: str, allowed: Sequence[Any], layers: int, origin: str) -> None:
    if not isinstance(value, (list, tuple)) or len(value) < layers:
        raise CheckpointError(
            lines(
                f"{origin}: {name} is {shown(value)}",
                f"expected a list with an entry for each of {layers} layers",
            )
        )
    wrong = [each for each in value if each not in allowed or isinstance(each, bool)]
    if wrong:
        expected = f"expected each to be {' or '.join(str(each) for each in allowed)}"
        raise CheckpointError(
            lines(f"{origin}: {name} has {shown(wrong[0])}, which is not supported", expected)
        )


def _asks(value: Any) -> bool:
    return value is True or value not in (None, False, 0, 1)
