"""Configs of well-known models, by name, for commands that need no weights. Pure data.

They are what the published config.json says of shapes and numerics, without token ids and the
like. A test holds every entry against transformers and the published number of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, lines
from .config_checks import check_config
from .dtype_names import unknown_dtype
from .spec import ModelSpec

ITEMSIZES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2})
"""Dtypes of weights, cache and activations -> bytes of a number."""
ALIASES: Mapping[str, str] = MappingProxyType({"smollm2": "smollm2-135m"})
"""Names of shipped models -> the config that they have."""
SAME_SHAPES = frozenset(
    {
        *("instruct", "chat", "hf", "base", "it", "unsloth", "dynamic", "quantized"),
        *("fp8", "bf16", "fp16", "int4", "int8", "w4a16", "w8a8", "4bit", "8bit"),
        *("bnb", "awq", "gptq", "gguf", "v0.1", "v1.0"),
    }
)
"""What stands behind a name in the hub's ids of models that have the same config."""
WEIGHTS: Mapping[str, str] = MappingProxyType(
    {
        "llama-2-7b": "meta-llama/Llama-2-7b-hf",
        "llama-2-13b": "meta-llama/Llama-2-13b-hf",
        "llama-2-70b": "meta-llama/Llama-2-70b-hf",
        "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
        # the 405B's first upload had 16 KV heads, which were 8 stored twice
        **{f"llama-3.1-{size}b": f"meta-llama/Llama-3.1-{size}B" for size in (8, 70, 405)},
        **{f"llama-3.2-{size}b": f"meta-llama/Llama-3.2-{size}B" for size in (1, 3)},
        "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
        "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
        "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
        "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
        "mistral-7b": "mistralai/Mistral-7B-v0.1",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B",
        "qwen3-8b": "Qwen/Qwen3-8B",
    }
)
"""Names of configs -> the hub's id of the model that each is of."""

_ROPE_8: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROPE_32 = _ROPE_8 | {"factor": 32.0}


def _config(
    model_type: str,
    *,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    positions: int,
    theta: float,
    head_dim: int | None = None,
    tied: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
    eps: float = 1e-5,
    dtype: str = "bfloat16",
    **more: Any,
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "model_type": model_type,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim or hidden // heads,
            "intermediate_size": intermediate,
            "vocab_size": vocab,
            "max_position_embeddings": positions,
            "tie_word_embeddings": tied,
            "rope_theta": theta,
            "rope_scaling": dict(rope_scaling) if rope_scaling else None,
            "rms_norm_eps": eps,
            "hidden_act": "silu",
            "torch_dtype": dtype,
            **more,
        }
    )


def _llama(**sizes: Any) -> Mapping[str, Any]:
    return _config("llama", attention_bias=False, mlp_bias=False, **sizes)


def _llama2(**sizes: Any) -> Mapping[str, Any]:
    return _llama(vocab=32000, positions=4096, theta=10000.0, dtype="float16", **sizes)


def _llama3(**sizes: Any) -> Mapping[str, Any]:
    return _llama(kv_heads=8, vocab=128256, theta=500000.0, **{"positions": 131072, **sizes})


def _smollm2(**sizes: Any) -> Mapping[str, Any]:
    return _llama(vocab=49152, positions=8192, tied=True, **sizes)


_70B: dict[str, Any] = {"hidden": 8192, "layers": 80, "heads": 64, "intermediate": 28672}
_8B: dict[str, Any] = {"hidden": 4096, "layers": 32, "heads": 32, "intermediate": 14336}

# Each is the config.json of its repository in `WEIGHTS`.
CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-2-7b": _llama2(hidden=4096, layers=32, heads=32, kv_heads=32, intermediate=11008),
        "llama-2-13b": _llama2(hidden=5120, layers=40, heads=40, kv_heads=40, intermediate=13824),
        "llama-2-70b": _llama2(kv_heads=8, **_70B),
        "llama-3-8b": _llama3(positions=8192, **_8B),
        "llama-3.1-8b": _llama3(rope_scaling=_ROPE_8, **_8B),
        "llama-3.1-70b": _llama3(rope_scaling=_ROPE_8, **_70B),
        "llama-3.1-405b": _llama3(
            rope_scaling=_ROPE_8, hidden=16384, layers=126, heads=128, intermediate=53248
        ),
        "llama-3.2-1b": _llama3(
            rope_scaling=_ROPE_32, hidden=2048, layers=16, heads=32, intermediate=8192, tied=True
        ),
        "llama-3.2-3b": _llama3(
            rope_scaling=_ROPE_32, hidden=3072, layers=28, heads=24, intermediate=8192, tied=True
        ),
        "llama-3.3-70b": _llama3(rope_scaling=_ROPE_8, **_70B),
        "tinyllama-1.1b": _llama(
            hidden=2048,
            layers=22,
            heads=32,
            kv_heads=4,
            intermediate=5632,
            vocab=32000,
            positions=2048,
            theta=10000.0,
        ),
        "smollm2-135m": _smollm2(
            hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536, theta=100000.0
        ),
        "smollm2-360m": _smollm2(
            hidden=960, layers=32, heads=15, kv_heads=5, intermediate=2560, theta=100000.0
        ),
        "smollm2-1.7b": _smollm2(
            hidden=2048, layers=24, heads=32, kv_heads=32, intermediate=8192, theta=130000.0
        ),
        "mistral-7b": _config(
            "mistral",
            kv_heads=8,
            vocab=32000,
            positions=32768,
            theta=10000.0,
            sliding_window=4096,
            **_8B,
        ),
        "qwen2.5-7b": _config(
            "qwen2",
            hidden=3584,
            layers=28,
            heads=28,
            kv_heads=4,
            intermediate=18944,
            vocab=152064,
            positions=131072,
            theta=1000000.0,
            eps=1e-6,
            sliding_window=131072,
            use_sliding_window=False,
            max_window_layers=28,
        ),
        "qwen3-8b": _config(
            "qwen3",
            hidden=4096,
            layers=36,
            heads=32,
            kv_heads=8,
            head_dim=128,
            intermediate=12288,
            vocab=151936,
            positions=40960,
            theta=1000000.0,
            eps=1e-6,
            attention_bias=False,
            sliding_window=None,
            use_sliding_window=False,
            max_window_layers=36,
        ),
    }
)


def named(name: str) -> Mapping[str, Any] | None:
    """The config of a shipped name, or None if there is no such name."""
    return CONFIGS.get(ALIASES.get(name, name))


def spec_of(document: Any, origin: str) -> ModelSpec:
    """The sizes in the contents of a config.json, without transformers.

    What loading refuses is refused here too, as far as that shows without transformers.

    Args:
        origin: what to call it in a message.

    Raises:
        CheckpointError: not a JSON object, or not a supported model.
    """
    if not isinstance(document, Mapping):
        raise CheckpointError(
            lines(f"{origin} holds a {type(document).__name__}", "expected a JSON object")
        )
    spec = ModelSpec.from_config(document, origin)
    check_config(document, origin, spec.vocab)
    return spec


def stored_dtype(document: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json says its weights have (`bfloat16`), or None if it doesn't."""
    value = document.get("dtype") or document.get("torch_dtype")
    return value if isinstance(value, str) else None


def loaded_dtype(asked: str, document: Mapping[str, Any]) -> str:
    """What loading on an accelerator makes of `--dtype`.

    `auto` is the config's own dtype where that is one we compute in, else float32.

    Raises:
        UsageError: no such dtype.
    """
    if asked == "auto":
        own = stored_dtype(document)
        return own if own is not None and own in ITEMSIZES else "float32"
    if asked not in ITEMSIZES:
        raise unknown_dtype(asked, ["auto", *ITEMSIZES])
    return asked
