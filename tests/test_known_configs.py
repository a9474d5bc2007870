"""Shipped configs: transformers reads each as we do, and their parameters add up as published."""

from typing import Any

import pytest
from messages import check_raised

from parallama.errors import CheckpointError, UsageError
from parallama.model.families import TP_PLANS
from parallama.model.known_configs import (
    ALIASES,
    CONFIGS,
    loaded_dtype,
    named,
    spec_of,
    stored_dtype,
)
from parallama.model.spec import ModelSpec
from parallama.plan.cost import parameter_count
from parallama.plan.styles import TRANSFORMERS_STYLES

# As the hub counts the tensors in each repository's safetensors files.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}
KNOWN = "llama, ministral, mistral, qwen2, qwen3, seed_oss, smollm3"
TINY: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def by_transformers(document: Any) -> ModelSpec:
    """The spec of transformers' config object, its plan's styles by our names."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[document["model_type"]].from_dict(dict(document))
    config.base_model_tp_plan = {
        name: TRANSFORMERS_STYLES.get(style, style)
        for name, style in config.base_model_tp_plan.items()
    }
    return ModelSpec.from_config(config)


def test_every_config_has_its_published_number_of_parameters():
    assert {
        name: parameter_count(spec_of(document, name)) for name, document in CONFIGS.items()
    } == PUBLISHED


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_shipped_config_is_to_transformers_what_it_is_to_us(name):
    assert spec_of(CONFIGS[name], name) == by_transformers(CONFIGS[name])


@pytest.mark.parametrize("model_type", sorted(TP_PLANS))
@pytest.mark.parametrize(
    "more", [{}, {"tie_word_embeddings": True}, {"head_dim": 10}], ids=["plain", "tied", "head_dim"]
)
def test_a_config_json_is_to_us_what_it_is_to_transformers(model_type, more):
    document = {"model_type": model_type, "head_dim": 4} | TINY | more
    assert spec_of(document, "config.json") == by_transformers(document)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_transformers_keeps_every_value_of_a_shipped_config(name):
    """No key is misspelt: transformers takes up each of them."""
    from transformers import CONFIG_MAPPING

    document = dict(CONFIGS[name])
    taken = CONFIG_MAPPING[document["model_type"]].from_dict(document).to_dict()
    rope = {"rope_theta": document.pop("rope_theta")} | (
        document.pop("rope_scaling") or {"rope_type": "default"}
    )
    assert {key: taken["rope_parameters"].get(key) for key in rope} == rope
    assert str(taken["dtype"]).removeprefix("torch.") == document.pop("torch_dtype")
    if not document.get("use_sliding_window", True):
        document.pop("sliding_window")  # transformers forgets a window that isn't used
    assert {key: taken.get(key, "missing") for key in document} == document


def test_an_alias_stands_for_a_config():
    assert all(named(alias) is CONFIGS[name] for alias, name in ALIASES.items())
    assert named("llama-3.1-8b") is CONFIGS["llama-3.1-8b"]
    assert named("llama-9") is None


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ([1, 2], ("the file", "list", "object")),
        (TINY | {"model_type": "gpt2"}, ("'gpt2'", "one fused weight", KNOWN)),
        (
            TINY | {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
            ("the file", "quantization_config", "float32, bfloat16", "float16"),
        ),
        *(
            (
                TINY | {"model_type": "llama", key: value},
                ("the file", "'mrope'", "default, linear, dynamic, yarn, llama3, longrope"),
            )
            for key, value in (
                ("rope_scaling", {"rope_type": "mrope"}),
                ("rope_scaling", {"type": "mrope", "factor": 2.0}),
                ("rope_parameters", {"rope_type": "mrope", "rope_theta": 10000.0}),
                ("rope_scaling", "mrope"),
            )
        ),
    ],
)
def test_a_config_that_loading_would_refuse_is_refused(document, parts):
    with pytest.raises(CheckpointError) as caught:
        spec_of(document, "the file")
    check_raised(caught.value, 3, *parts)


def test_auto_is_the_stored_dtype_where_we_compute_in_it():
    assert [
        stored_dtype(document)
        for document in ({"torch_dtype": "float16"}, {"dtype": "bfloat16"}, {}, {"dtype": 7})
    ] == [
        "float16",
        "bfloat16",
        None,
        None,
    ]
    assert loaded_dtype("auto", {"dtype": "bfloat16"}) == "bfloat16"
    assert loaded_dtype("auto", {"torch_dtype": "float16"}) == "float32"
    assert loaded_dtype("auto", {}) == "float32"
    assert loaded_dtype("bfloat16", {}) == "bfloat16"
    with pytest.raises(UsageError) as caught:
        loaded_dtype("int4", {})
    check_raised(caught.value, 2, "dtype 'int4'", "auto, float32", "bfloat16")
