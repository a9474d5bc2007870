"""A model's sizes, read from its config: they are transformers' own, or it is an error."""

from typing import Any

import pytest
from messages import check_raised

from parallama.errors import CheckpointError
from parallama.model.families import TP_PLANS
from parallama.model.spec import _LIMITS, ModelSpec
from parallama.plan.styles import TRANSFORMERS_STYLES

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
KNOWN = "llama, ministral, mistral, qwen2, qwen3, seed_oss, smollm3"
# Sizes that every config.json must give; the others have a default.
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 10}),
    ("llama", {"num_key_value_heads": 6}),
    ("mistral", {}),
    ("mistral", {"head_dim": 10, "tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 10}),
    ("qwen3", {"head_dim": 4, "attention_bias": True, "tie_word_embeddings": True}),
    ("ministral", {"head_dim": 10}),
    ("smollm3", {"pad_token_id": None}),
    (
        "smollm3",
        {
            "pad_token_id": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 10,
        },
    ),
    ("seed_oss", {}),
    (
        "seed_oss",
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": 4},
    ),
]
# Switches of one family's config that transformers' other families don't know.
FOREIGN_SWITCHES = [
    ("mistral", {"attention_bias": True}),
    ("mistral", {"mlp_bias": True}),
    ("qwen2", {"attention_bias": True}),
    ("qwen2", {"mlp_bias": True}),
    ("qwen3", {"head_dim": 4, "mlp_bias": True}),
    ("ministral", {"head_dim": 4, "attention_bias": True, "mlp_bias": True}),
]
LEFT_OUT = [
    (model_type, name)
    for model_type in sorted(TP_PLANS)
    for name in (
        "head_dim",
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
    )
]


def config_of(model_type: str, **values: Any) -> Any:
    return by_transformers(SIZES | values | {"model_type": model_type})


def by_transformers(document: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[document["model_type"]].from_dict(document)


def shapes_by_transformers(config: Any) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("model_type", "values"), FAMILIES)
def test_parameters_are_those_of_transformers_model(model_type, values):
    config = config_of(model_type, **values)
    parameters = list(ModelSpec.from_config(config).parameters())
    assert dict(parameters) == shapes_by_transformers(config)
    assert len(dict(parameters)) == len(parameters)


@pytest.mark.parametrize(("model_type", "values"), FOREIGN_SWITCHES)
def test_a_switch_that_transformers_ignores_adds_no_parameters(model_type, values):
    config = config_of(model_type, **values)
    assert dict(ModelSpec.from_config(config).parameters()) == shapes_by_transformers(config)


@pytest.mark.parametrize(("model_type", "values"), FAMILIES)
def test_a_config_json_gives_the_same_spec_as_transformers_object(model_type, values):
    raw = SIZES | values | {"model_type": model_type}
    ours, theirs = (
        ModelSpec.from_config(raw),
        ModelSpec.from_config(config_of(model_type, **values)),
    )
    assert dict(ours.parameters()) == dict(theirs.parameters())
    assert (ours.max_positions, ours.tied) == (theirs.max_positions, theirs.tied)


@pytest.mark.parametrize(("model_type", "missing"), LEFT_OUT)
def test_a_size_that_config_json_leaves_out_is_what_transformers_takes_it_for(model_type, missing):
    raw = SIZES | {
        "model_type": model_type,
        "num_attention_heads": 32,
        "hidden_size": 64,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    raw.pop(missing, None)
    ours, theirs = (ModelSpec.from_config(each) for each in (raw, by_transformers(raw)))
    for name in (
        "kv_heads",
        "head_dim",
        "max_positions",
        "tied",
        "qkv_bias",
        "output_bias",
        "mlp_bias",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "smollm3", "seed_oss"])
def test_a_size_that_is_null_is_what_transformers_takes_it_for(model_type):
    raw = SIZES | {"model_type": model_type, "num_key_value_heads": None, "pad_token_id": None}
    raw |= {"head_dim": None} if model_type in ("llama", "seed_oss") else {}
    theirs = shapes_by_transformers(by_transformers(raw))
    assert dict(ModelSpec.from_config(raw).parameters()) == theirs


@pytest.mark.parametrize("model_type", sorted(TP_PLANS))
def test_our_tensor_parallel_plans_are_transformers_own(model_type):
    from transformers import CONFIG_MAPPING

    theirs = CONFIG_MAPPING[model_type]().base_model_tp_plan
    assert TP_PLANS[model_type] == {
        module: TRANSFORMERS_STYLES.get(style, style) for module, style in theirs.items()
    }


def test_a_config_objects_own_plan_is_the_one_used():
    config = config_of("llama")
    config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}
    assert ModelSpec.from_config(config).tp_plan == {"layers.*.self_attn.q_proj": "colwise"}


def test_the_sizes_are_read_from_the_keys_that_transformers_writes():
    spec = ModelSpec.from_config(
        SIZES | {"model_type": "llama", "head_dim": 10, "tie_word_embeddings": True}
    )
    assert (spec.hidden, spec.layers, spec.query_heads, spec.kv_heads) == (24, 2, 6, 2)
    assert (spec.head_dim, spec.intermediate, spec.vocab, spec.max_positions, spec.tied) == (
        10,
        40,
        50,
        64,
        True,
    )


def check_refused(values: dict[str, Any], *parts: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_config(values)
    check_raised(caught.value, 3, *parts)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", sorted(_LIMITS))
@pytest.mark.parametrize("value", [0, -1, "8", 8.0, True, [8], {}, 1 << 40], ids=repr)
def test_a_size_that_is_no_sensible_number_is_an_error_that_names_it(name, value):
    values = SIZES | {"model_type": "llama", name: value}
    check_refused(values, f"{name} is {value!r}", f"1 to {_LIMITS[name]}")


@pytest.mark.parametrize("name", sorted(_LIMITS))
def test_a_size_one_above_its_limit_is_an_error(name):
    value = _LIMITS[name] + 1
    check_refused(SIZES | {"model_type": "llama", name: value}, f"{name} is {value}")


@pytest.mark.parametrize("how", ["left out", "null"])
@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_size_is_an_error_that_names_it(name, how):
    values = SIZES | {"model_type": "llama"}
    if how == "null":
        values[name] = None
    else:
        del values[name]
    check_refused(values, f"{name} is None", f"1 to {_LIMITS[name]}")


def test_query_heads_that_the_kv_heads_do_not_divide_are_an_error():
    values = {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 4}
    check_refused(SIZES | values, "num_attention_heads 6", "num_key_value_heads 4", "multiple")


def test_an_odd_head_dim_is_an_error():
    check_refused(SIZES | {"model_type": "llama", "head_dim": 5}, "head_dim is 5")


@pytest.mark.parametrize("value", ["8" * 100_000, [8] * 100_000], ids=["text", "list"])
def test_a_long_value_does_not_flood_the_message(value):
    check_refused(SIZES | {"model_type": "llama", "hidden_size": value}, "hidden_size")


@pytest.mark.parametrize("model_type", ["Llama", "", None, 7, ["llama"], {"llama": 1}], ids=repr)
def test_another_model_type_is_an_error_that_lists_those_we_know(model_type):
    check_refused(SIZES | {"model_type": model_type}, f"model_type {model_type!r}", KNOWN)


def test_a_config_without_model_type_is_an_error():
    check_refused(SIZES, "model_type None", KNOWN)
