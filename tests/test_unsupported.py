"""What is not supported is refused with its reason before anything is read or run.

What is refused is really so in transformers.
"""

from typing import Any

import pytest
from messages import says

from parallama.errors import CheckpointError
from parallama.model.families import FAMILIES, REASONS
from parallama.model.rope import ROPE_TYPES
from parallama.model.spec import ModelSpec
from parallama.model.unsupported import unsupported_feature

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 4}
SMOLLM3 = LLAMA | {"model_type": "smollm3"}
MISTRAL = LLAMA | {"model_type": "mistral"}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 2.0],
    "original_max_position_embeddings": 16,
}


def check_refused(values: dict[str, Any], *parts: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_config(values, "config.json")
    assert says(caught.value, *parts) and len(str(caught.value)) < 500, caught.value


FEATURES: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    (LLAMA, {"num_local_experts": 8}, ("num_local_experts is 8", "mixture of experts")),
    (QWEN3, {"num_experts": 128}, ("num_experts is 128", "mixture of experts")),
    (
        LLAMA,
        {"final_logit_softcapping": 30.0},
        ("final_logit_softcapping is 30.0", "soft-capping"),
    ),
    (LLAMA, {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping is 50.0", "soft-capping")),
    (LLAMA, {"kv_lora_rank": 512}, ("kv_lora_rank is 512", "latent attention")),
    (LLAMA, {"clip_qkv": 8.0}, ("clip_qkv is 8.0",)),
    (LLAMA, {"vision_config": {"depth": 2}}, ("vision_config is {'depth': 2}", "images")),
    (LLAMA, {"is_causal": False}, ("is_causal is False",)),
    (LLAMA, {"use_bidirectional_attention": True}, ("use_bidirectional_attention is True",)),
    (LLAMA, {"per_layer_config": {"0": {"intermediate_size": 8}}}, ("per_layer_config is",)),
    (LLAMA, {"quantization_config": {"quant_method": "awq"}}, ("quantization_config", "float16")),
    (LLAMA, {"quantization": {"bits": 4, "group_size": 64}}, ("quantization", "float16")),
    (
        LLAMA,
        {"layer_types": ["full_attention", "sliding_attention"]},
        ("layer_types has 'sliding_attention'",),
    ),
    (
        MISTRAL,
        {"layer_types": ["full_attention"] * 2},
        ("layer_types has 'full_attention'", "expected sliding_attention"),
    ),
    (
        QWEN3,
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
        ("layer_types has 'sliding_attention'",),
    ),
    (
        QWEN3,
        {"layer_types": ["chunked_attention"] * 2},
        ("layer_types has 'chunked_attention'",),
    ),
    (
        QWEN3,
        {"layer_types": ["full_attention"]},
        ("layer_types is ['full_attention']", "2 layers"),
    ),
    (QWEN3, {"layer_types": "full"}, ("layer_types is 'full'",)),
    (QWEN3, {"layer_types": [None, None]}, ("layer_types has None",)),
    (MISTRAL, {"sliding_window": 0}, ("sliding_window is 0", "at least 1")),
    (MISTRAL, {"sliding_window": "8"}, ("sliding_window is '8'",)),
    (QWEN3, {"sliding_window": -1, "use_sliding_window": True}, ("sliding_window is -1",)),
    (
        LLAMA | {"model_type": "ministral"},
        {"sliding_window": None},
        ("sliding_window is None",),
    ),
    (SMOLLM3, {"no_rope_layers": [1]}, ("no_rope_layers is [1]", "2 layers")),
    (SMOLLM3, {"no_rope_layers": [1, 2]}, ("no_rope_layers has 2",)),
    (SMOLLM3, {"no_rope_layer_interval": 0}, ("no_rope_layer_interval is 0", "at least 1")),
]


@pytest.mark.parametrize(
    ("values", "more", "parts"), FEATURES, ids=[str(more)[:60] for _, more, _ in FEATURES]
)
def test_what_a_family_does_not_have_is_refused_with_the_reason(values, more, parts):
    ModelSpec.from_config(values)
    check_refused(values | more, "config.json", *parts)


ROPES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5", "expected 1")),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        ("partial_rotary_factor 0.25",),
    ),
    (
        {"rope_scaling": {"type": "su"}},
        ("rope type 'su'", "default, linear, dynamic, yarn, llama3, longrope"),
    ),
    ({"rope_scaling": {"rope_type": ["linear"]}}, ("rope type ['linear']",)),
    ({"rope_scaling": [1]}, ("rope type [1]",)),
    ({"rope_parameters": {"full_attention": LINEAR}}, ("['full_attention']",)),
    (
        {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}},
        ("mrope_section [8, 4, 4]",),
    ),
    ({"rope_theta": 0}, ("rope_theta is 0", "above 1")),
    ({"rope_theta": "1e4"}, ("rope_theta is '1e4'",)),
    ({"rope_theta": None}, ("rope_theta is None",)),
    ({"rope_theta": float("nan")}, ("rope_theta is nan",)),
    *(
        ({"rope_scaling": LINEAR | {"factor": factor}}, (f"factor is {factor!r}", "at least 1"))
        for factor in (0, -1, "2", True)
    ),
    ({"rope_scaling": {"rope_type": "dynamic"}}, ("factor is None",)),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2},
        ("head_dim is 2", "'dynamic'"),
    ),
    (
        {"rope_scaling": LINEAR | {"factor": 1e12}},
        ("'linear'", "64000000000000 positions", "at most 2147483648"),
    ),
    (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        ("high_freq_factor is 1.0", "above 1"),
    ),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, ("low_freq_factor is None",)),
    (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 0},
        ("original_max_position_embeddings is 0",),
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}},
        ("beta_fast is 'x'",),
    ),
    ({"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, ("long_factor is [1.0]", "2 numbers")),
    (
        {"rope_scaling": LONGROPE | {"short_factor": [1.0, 0.0]}},
        ("short_factor holds 0.0", "above 0"),
    ),
    ({"rope_scaling": {"rope_type": "longrope"}}, ("short_factor is None",)),
]


@pytest.mark.parametrize(("more", "parts"), ROPES, ids=[str(more)[:60] for more, _ in ROPES])
def test_a_rotary_embedding_that_cannot_be_run_is_refused_with_the_reason(more, parts):
    check_refused(LLAMA | more, "config.json", *parts)


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        (None, 64),
        ({"type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.5}, 160),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 64),
        (LLAMA3, 64),
        (LONGROPE, 64),
    ],
    ids=str,
)
def test_the_longest_sequence_is_what_the_rotary_embedding_was_stretched_to(rope, reach):
    from transformers import CONFIG_MAPPING

    spec = ModelSpec.from_config(LLAMA | {"rope_scaling": rope})
    assert spec.max_positions == reach
    assert spec.rope == ((rope or {}).get("rope_type") or (rope or {}).get("type", "default"))
    assert spec == ModelSpec.from_config(
        CONFIG_MAPPING["llama"].from_dict(LLAMA | {"rope_scaling": rope and dict(rope)})
    )


def test_every_rope_type_of_transformers_is_supported_or_refused_by_name():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert {"default", *ROPE_INIT_FUNCTIONS} - set(ROPE_TYPES) == {"proportional"}


# -- families that aren't supported

_FUSED = ("qkv", "query_key_value", "c_attn")


@pytest.mark.parametrize("model_type", sorted(REASONS))
def test_another_family_is_refused_with_a_reason(model_type):
    known = ", ".join(sorted(FAMILIES))
    check_refused({"model_type": model_type}, repr(model_type), REASONS[model_type], known)


def test_an_unnamed_family_is_refused_with_what_its_config_shows():
    check_refused({"model_type": "some_moe", "num_experts": 64}, "'some_moe'", "mixture of experts")


@pytest.mark.parametrize("model_type", sorted(set(REASONS) - {"dbrx", "nemotron"}))
def test_the_reason_is_true_of_transformers_own_modules(model_type):
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING:
        return  # transformers has no code of its own for it
    config = CONFIG_MAPPING[model_type]()
    with torch.device("meta"):
        names = {name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()}
    layer = {name.split(".", 3)[-1] for name in names if ".0." in name or ".1." in name}
    values, reason = config.to_dict(), REASONS[model_type]
    llamas = {
        f"{part}.weight"
        for part in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    if reason == "mixture of experts":
        assert (
            any("expert" in name or "router" in name for name in names)
            and unsupported_feature(values) == reason
        )
    elif reason.startswith("query, key and value"):
        assert any(word in name.lower() for name in layer for word in _FUSED)
    elif reason.startswith("gate and up"):
        assert "mlp.gate_up_proj.weight" in layer
    elif reason.startswith("soft-capping"):
        assert unsupported_feature(values) == reason
    elif reason.startswith("rotary embedding of a part"):
        assert config.rope_parameters["partial_rotary_factor"] < 1
    elif reason.startswith("norms other"):
        assert any("feedforward_layernorm" in name for name in layer)
    elif reason.startswith("layer norms without"):
        assert not any("norm" in name for name in layer)
    elif reason.startswith("attention and MLP side by side"):
        assert not any("post_attention" in name for name in layer)
    elif reason.startswith("multipliers"):
        assert {"embedding_multiplier", "residual_multiplier", "logits_scaling"} <= values.keys()
    else:
        assert reason == "an embedding that scales its output" and layer >= llamas


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_supported_familys_own_defaults_are_not_refused(model_type):
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    assert ModelSpec.from_config(config).model_type == model_type
    assert unsupported_feature(config.to_dict()) is None
