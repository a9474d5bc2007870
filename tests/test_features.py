"""What is not supported is refused with its reason, before anything is read or run; what is refused is really so in transformers."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

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
PLAIN = "expected plain weights: float32, bfloat16 or float16"


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_config(values, "config.json")
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and len(message) < 500
    return message


FEATURES = [
    (
        LLAMA,
        {"num_local_experts": 8},
        "config.json: num_local_experts is 8: mixture of experts is not supported",
    ),
    (
        QWEN3,
        {"num_experts": 128},
        "config.json: num_experts is 128: mixture of experts is not supported",
    ),
    (
        LLAMA,
        {"final_logit_softcapping": 30.0},
        "config.json: final_logit_softcapping is 30.0: soft-capping of logits is not supported",
    ),
    (
        LLAMA,
        {"attn_logit_softcapping": 50.0},
        "config.json: attn_logit_softcapping is 50.0: soft-capping of logits is not supported",
    ),
    (
        LLAMA,
        {"kv_lora_rank": 512},
        "config.json: kv_lora_rank is 512: latent attention is not supported",
    ),
    (
        LLAMA,
        {"clip_qkv": 8.0},
        "config.json: clip_qkv is 8.0: clipped queries, keys and values is not supported",
    ),
    (
        LLAMA,
        {"vision_config": {"depth": 2}},
        "config.json: vision_config is {'depth': 2}: images or sound beside text is not supported",
    ),
    (LLAMA, {"is_causal": False}, "config.json: is_causal is False"),
    (
        LLAMA,
        {"use_bidirectional_attention": True},
        "config.json: use_bidirectional_attention is True: attention in both directions is",
    ),
    (
        LLAMA,
        {"per_layer_config": {"0": {"intermediate_size": 8}}},
        "config.json: per_layer_config is",
    ),
    (
        LLAMA,
        {"quantization_config": {"quant_method": "awq"}},
        f"config.json has a quantization_config\n{PLAIN}",
    ),
    (
        LLAMA,
        {"quantization": {"bits": 4, "group_size": 64}},
        f"config.json has a quantization\n{PLAIN}",
    ),
    (
        LLAMA,
        {"layer_types": ["full_attention", "sliding_attention"]},
        "config.json: layer_types has 'sliding_attention'",
    ),
    (
        MISTRAL,
        {"layer_types": ["full_attention"] * 2},
        "config.json: layer_types has 'full_attention'\nexpected sliding_attention, for",
    ),
    (
        QWEN3,
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
        "config.json: layer_types has 'sliding_attention'",
    ),
    (
        QWEN3,
        {"layer_types": ["chunked_attention"] * 2},
        "config.json: layer_types has 'chunked_attention', which is not supported",
    ),
    (
        QWEN3,
        {"layer_types": ["full_attention"]},
        "config.json: layer_types is ['full_attention']\nexpected a list with an entry for each of 2",
    ),
    (QWEN3, {"layer_types": "full"}, "config.json: layer_types is 'full'"),
    (
        QWEN3,
        {"layer_types": [None, None]},
        "config.json: layer_types has None, which is not supported",
    ),
    (
        MISTRAL,
        {"sliding_window": 0},
        "config.json: sliding_window is 0\nexpected null or a whole number of at least 1",
    ),
    (MISTRAL, {"sliding_window": "8"}, "config.json: sliding_window is '8'"),
    (
        QWEN3,
        {"sliding_window": -1, "use_sliding_window": True},
        "config.json: sliding_window is -1",
    ),
    (
        LLAMA | {"model_type": "ministral"},
        {"sliding_window": None},
        "config.json: sliding_window is None",
    ),
    (
        SMOLLM3,
        {"no_rope_layers": [1]},
        "config.json: no_rope_layers is [1]\nexpected a list with an entry for each of 2 layers",
    ),
    (
        SMOLLM3,
        {"no_rope_layers": [1, 2]},
        "config.json: no_rope_layers has 2, which is not supported",
    ),
    (
        SMOLLM3,
        {"no_rope_layer_interval": 0},
        "config.json: no_rope_layer_interval is 0\nexpected a whole number of at least 1",
    ),
]


@pytest.mark.parametrize(
    ("values", "more", "said"), FEATURES, ids=[str(more)[:60] for _, more, _ in FEATURES]
)
def test_what_a_family_does_not_have_is_refused_with_the_reason(values, more, said):
    ModelSpec.from_config(values)
    assert refused(values | more).startswith(said)


ROPES = [
    (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 is not supported\nexpected 1: every head is rotated whole",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor 0.25 is not supported",
    ),
    (
        {"rope_scaling": {"type": "su"}},
        "rope type 'su' is not supported\nexpected one of default, linear, dynamic, yarn, llama3, longrope",
    ),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope type ['linear'] is not supported"),
    ({"rope_scaling": [1]}, "rope type [1] is not supported"),
    (
        {"rope_parameters": {"full_attention": LINEAR}},
        "rotary embedding differs between layers: ['full_attention']",
    ),
    (
        {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]}},
        "mrope_section [8, 4, 4] is not supported",
    ),
    ({"rope_theta": 0}, "rope_theta is 0\nexpected a number above 1, for rotary embedding"),
    ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    ({"rope_theta": None}, "rope_theta is None"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    *(
        (
            {"rope_scaling": LINEAR | {"factor": factor}},
            f"factor is {factor!r}\nexpected a number of at least 1",
        )
        for factor in (0, -1, "2", True)
    ),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "factor is None"),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2},
        "head_dim is 2\nexpected more than 2 for rope type 'dynamic'",
    ),
    (
        {"rope_scaling": LINEAR | {"factor": 1e12}},
        "rope type 'linear' reaches 64000000000000 positions\nexpected at most 2147483648",
    ),
    (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "high_freq_factor is 1.0\nexpected a number above 1",
    ),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor is None"),
    (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 0},
        "original_max_position_embeddings is 0",
    ),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}}, "beta_fast is 'x'"),
    (
        {"rope_scaling": LONGROPE | {"long_factor": [1.0]}},
        "long_factor is [1.0]\nexpected a list of 2 numbers, half of head_dim",
    ),
    (
        {"rope_scaling": LONGROPE | {"short_factor": [1.0, 0.0]}},
        "short_factor holds 0.0\nexpected numbers above 0",
    ),
    ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor is None"),
]


@pytest.mark.parametrize(("more", "said"), ROPES, ids=[str(more)[:60] for more, _ in ROPES])
def test_a_rotary_embedding_that_cannot_be_run_is_refused_with_the_reason(more, said):
    assert refused(LLAMA | more).startswith(f"config.json: {said}")


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
    first, second = refused({"model_type": model_type}).splitlines()
    assert first == f"model_type {model_type!r} is not supported: {REASONS[model_type]}"
    assert second == f"expected one of {', '.join(sorted(FAMILIES))}"


def test_an_unnamed_family_is_refused_with_what_its_config_shows():
    assert refused({"model_type": "some_moe", "num_experts": 64}).startswith(
        "model_type 'some_moe' is not supported: mixture of experts\n"
    )


@pytest.mark.parametrize(
    "model_type", sorted(set(REASONS) & set(CONFIG_MAPPING) - {"dbrx", "nemotron"})
)
def test_the_reason_is_true_of_transformers_own_modules(model_type):
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
    config = CONFIG_MAPPING[model_type]()
    assert ModelSpec.from_config(config).model_type == model_type
    assert unsupported_feature(config.to_dict()) is None
