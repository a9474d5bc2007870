"""What the metadata of a GGUF file say, as config.json and generation_config.json say it. Pure.

The keys are those that llama.cpp's converter writes for our families. Each is read, asks for
nothing here (names, licences, quantization), or is refused where the family doesn't have it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, lines, shown
from ..model.families import FAMILIES, REASONS
from .gguf_rope import rope_settings

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Those whose converter is known: its names, its order of rows."""
TOKENS = "tokenizer.ggml.tokens"
_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "attention.key_length": "head_dim",
}
# Key -> what it asks for, unless its value asks for nothing.
_REFUSED = {
    "expert_count": "mixture of experts",
    "attn_logit_softcapping": "soft-capping of logits",
    "final_logit_softcapping": "soft-capping of logits",
    "attention.clamp_kqv": "clipped queries, keys and values",
    "attention.max_alibi_bias": "attention with linear biases",
    "attention.scale": "a scale of attention",
    "attention.shared_kv_layers": "layers that share keys and values",
    "logit_scale": "a multiplier of logits",
    "residual_scale": "a multiplier of residuals",
    "embedding_scale": "a multiplier of the embedding",
    "attention.causal": "attention in both directions",
    "use_parallel_residual": "attention and MLP side by side",
    "pooling_type": "a model of embeddings or ranks, not of text",
    "nextn_predict_layers": "layers that predict several tokens",
}
_NEUTRAL, _ONE, _TRUE = (None, False, 0), (None, 0, 1), (None, True)
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
"""Control tokens that end a turn for llama.cpp, too, where a file names none."""
_CONTROL = 3


def check_supported(metadata: Mapping[str, Any], origin: str) -> None:
    """Refuse a file that is not a whole model of a known architecture.

    Args:
        origin: the file's name.

    Raises:
        CheckpointError: with the key, and its value.
    """
    architecture = metadata["general.architecture"]
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            lines(
                f"{origin}: general.type is {shown(kind)}",
                "expected a model, not a part of one or an adapter",
            )
        )
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            lines(
                f"{origin} is one of {shown(parts)} parts of a model (split.count)",
                "expected a model in one file",
                "merge them: llama-gguf-split --merge FIRST-PART OUT.gguf",
            )
        )
    if architecture not in ARCHITECTURES:
        reason = REASONS.get(architecture)
        raise CheckpointError(
            lines(
                f"{origin} holds a {shown(architecture)} model, which is not supported as GGUF"
                + (f": {reason}" if reason else ""),
                f"expected one of {', '.join(ARCHITECTURES)}",
                "use the safetensors checkpoint" if architecture in FAMILIES else "",
            )
        )
    for key, what in _REFUSED.items():
        value = metadata.get(f"{architecture}.{key}")
        neutral = _ONE if key.endswith("_scale") else _NEUTRAL
        if value not in (_TRUE if key == "attention.causal" else neutral):
            raise CheckpointError(
                lines(
                    f"{origin}: {architecture}.{key} is {shown(value)}: {what} is not supported",
                    f"expected a plain {architecture} model",
                )
            )


def described(
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    factors: Sequence[float] | None,
    origin: str,
) -> dict[str, Any]:
    """The config.json that the metadata amount to.

    Args:
        tensors: names of all tensors.
        factors: of rotary frequencies, if the file has them.
        origin: the file's name.

    Raises:
        CheckpointError: keys that contradict each other, or ask for what is not supported.
    """
    architecture = metadata["general.architecture"]
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    config: dict[str, Any] = {_SIZES[key]: own[key] for key in _SIZES if key in own}
    config["model_type"] = architecture
    if "rms_norm_eps" not in config:
        raise CheckpointError(
            lines(f"{origin}: {prefix}attention.layer_norm_rms_epsilon is missing", "expected it")
        )
    tokens = metadata.get(TOKENS)
    config.setdefault("vocab_size", len(tokens) if isinstance(tokens, list) else tokens)
    heads = config.get("num_attention_heads")
    config.setdefault("num_key_value_heads", heads)
    hidden = config.get("hidden_size")
    if type(hidden) is int and type(heads) is int and heads > 0:
        config.setdefault("head_dim", hidden // heads)
    head_dim = config.get("head_dim")
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key) not in (None, 0, head_dim):
            raise CheckpointError(
                lines(
                    f"{origin}: {prefix}{key} is {shown(own[key])}, and the head's length is "
                    f"{shown(head_dim)}",
                    "expected the same: every head is rotated whole",
                )
            )
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    window, positions = own.get("attention.sliding_window"), config.get("max_position_embeddings")
    is_wide = not window or (type(positions) is int and window >= positions)
    if not is_wide and architecture != "mistral":
        raise CheckpointError(
            lines(
                f"{origin}: {prefix}attention.sliding_window is {shown(window)}",
                f"expected none, in a {architecture} model",
                "use the safetensors checkpoint",
            )
        )
    config["sliding_window"] = None if is_wide else window
    if type(head_dim) is int and type(positions) is int:
        config["rope_parameters"] = rope_settings(
            own,
            factors,
            theta=own.get("rope.freq_base", 10000.0),
            head_dim=head_dim,
            positions=positions,
            origin=origin,
        )
    return config


def generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The generation config: ids that end a text or a turn, and how the model is sampled."""
    found: dict[str, Any] = {}
    ends = [metadata[key] for name in _ENDS if (key := f"tokenizer.ggml.{name}") in metadata]
    if "tokenizer.ggml.eot_token_id" not in metadata:
        ends += _turn_ends(metadata)
    if ends:
        ids = list(dict.fromkeys(ends))
        found["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    if "tokenizer.ggml.bos_token_id" in metadata:
        found["bos_token_id"] = metadata["tokenizer.ggml.bos_token_id"]
    sampling = {
        name: metadata[f"general.sampling.{key}"]
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in metadata
    }
    if sampling:
        found |= {"do_sample": sampling.get("temperature", 1) != 0} | sampling
    return found


def ignored(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Keys that ask for something that is left out -> why."""
    known = {f"general.sampling.{key}" for key in _SAMPLING}
    return {
        key: "a sampler that is not supported"
        for key, value in metadata.items()
        if key.startswith("general.sampling.") and key not in known and value not in _NEUTRAL
    }


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the file holds a vocabulary; one of a model alone says `none`, or nothing."""
    return TOKENS in metadata and metadata.get("tokenizer.ggml.model") not in ("none", "no_vocab")


def _turn_ends(metadata: Mapping[str, Any]) -> list[int]:
    tokens, kinds = metadata.get(TOKENS), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return []
    return [
        index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in _TURN_ENDS
    ]
