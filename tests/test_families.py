"""Every family and rotary embedding: logits and greedy tokens are transformers' own.

No program has a collective that the plan doesn't have.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from messages import check_raised

from parallama.errors import FitError
from parallama.model.spec import ModelSpec
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import MeshShape
from parallama.train.layout import training_plan
from parallama.train.options import StepOptions
from parallama.train.torch_xla.step import check_fit

MESHES = ("1x1", "1x2", "1x3", "1x8", "2x4")
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Both change their frequencies from the 25th position on.
DYNAMIC = {
    "positions": 24,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.5, 2.0, 4.0, 9.0],
        "original_max_position_embeddings": 24,
    }
}
WINDOW = {"sliding_window": 11}
SWITCHED = WINDOW | {"use_sliding_window": True}
# Heads that divide on some of the meshes and not on others; 37 and the vocabulary divide on none
# but 1x1. No two may make the same program: it would be compiled, and dumped, once.
VOCAB = 103
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"heads": 8, "kv_heads": 8},
    "llama, linear": {
        "heads": 9,
        "kv_heads": 3,
        "tied": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama, dynamic": {"heads": 4, "kv_heads": 2, **DYNAMIC},
    "llama, yarn": {"heads": 6, "kv_heads": 2, "attention_bias": True, "rope_parameters": YARN},
    "llama, llama3": {"heads": 8, "kv_heads": 2, "tied": True, "rope_parameters": LLAMA3},
    "llama, longrope": {"heads": 5, "kv_heads": 1, "mlp_bias": True, **LONGROPE},
    "llama, head_dim, all biases": {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 14,
        "attention_bias": True,
        "mlp_bias": True,
        "tied": True,
    },
    "mistral, window": {"family": "mistral", "heads": 4, "kv_heads": 2, **WINDOW},
    "mistral, no window": {
        "family": "mistral",
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 6,
        "sliding_window": None,
        "tied": True,
    },
    "ministral": {
        "family": "ministral",
        "heads": 6,
        "kv_heads": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        **WINDOW,
    },
    "qwen2": {"family": "qwen2", "heads": 6, "kv_heads": 2, "tied": True},
    "qwen2, window": {
        "family": "qwen2",
        "heads": 14,
        "kv_heads": 2,
        "head_dim": 4,
        "max_window_layers": 1,
        **SWITCHED,
    },
    "qwen3": {"family": "qwen3", "heads": 9, "kv_heads": 3},
    "qwen3, window, biases": {
        "family": "qwen3",
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 12,
        "tied": True,
        "attention_bias": True,
        "max_window_layers": 1,
        **SWITCHED,
    },
    "smollm3": {
        "family": "smollm3",
        "heads": 4,
        "kv_heads": 1,
        "tied": True,
        "no_rope_layers": [1, 0],
        "rope_parameters": YARN,
    },
    "smollm3, window": {
        "family": "smollm3",
        "heads": 9,
        "kv_heads": 3,
        "no_rope_layer_interval": 2,
        "attention_bias": True,
        "mlp_bias": True,
        **SWITCHED,
    },
    "seed_oss": {
        "family": "seed_oss",
        "heads": 10,
        "kv_heads": 2,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
}
FOLLOWING = {
    "dynamic": {"heads": 4, "kv_heads": 2, **DYNAMIC},
    "longrope": {"heads": 9, "kv_heads": 3, "tied": True, **LONGROPE},
}


# Each family on one mesh, each mesh as often as the others; the rest is slow.
CASES = [
    pytest.param(name, mesh, marks=() if (index - place) % 5 == 0 else pytest.mark.slow)
    for index, name in enumerate(FAMILIES)
    for place, mesh in enumerate(MESHES)
]


def devices(mesh: str) -> int:
    data, model = (int(size) for size in mesh.split("x"))
    return data * model


def as_new(tiny: reference.Tiny) -> Any:
    """The model, its rotary embedding without a memory of longer texts."""
    model = tiny.model
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


def assert_equal(got: dict[str, Any], wanted: list[tuple[list[int], list[float]]]) -> None:
    for row, (tokens, logprobs) in enumerate(wanted):
        assert got["tokens"][row] == tokens, f"row {row}"
        assert got["logprobs"][row] == pytest.approx(logprobs, abs=2e-4), f"row {row}"


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_family_continues_as_in_transformers_with_the_planned_collectives(
    auditors: Any, models: Any, name: str, mesh: str
) -> None:
    tiny = models(vocab=VOCAB, **FAMILIES[name])
    # A batch's longest row decides on frequencies that follow it: there, rows of one length get
    # what each gets alone.
    prompts = reference.random_prompts(
        [20] * 4 if name.endswith(("dynamic", "longrope")) else [20, 3, 30, 14], tiny.vocab
    )
    got = auditors("audited_run", tiny.folder, mesh, prompts=prompts, steps=10)
    for phase, document in got["audits"].items():
        assert document["passed"], (phase, document["findings"])
    assert_equal(got, [reference.greedy(as_new(tiny), prompt, 10) for prompt in prompts])
    assert got["after_warmup"] == 0


# -- rotary embedding that follows the length


@pytest.mark.parametrize("mesh", ["1x2", pytest.param("2x4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FOLLOWING)
def test_a_batch_turns_by_its_longest_row(workers: Any, models: Any, kind: str, mesh: str) -> None:
    tiny = models(**FOLLOWING[kind])
    worker = workers[devices(mesh)]
    # None beyond 24 positions; one that gets there while decoding; one that starts there.
    for lengths in ([9, 3, 1, 14], [5, 20, 8, 11], [26, 4, 17, 30]):
        prompts = reference.random_prompts(lengths, tiny.vocab)
        got = worker.call(
            "device_cases:generate",
            folder=tiny.folder,
            mesh=mesh,
            prompts=prompts,
            steps=8,
            longest_prompt=30,
        )
        assert_equal(got, reference.greedy_batch(as_new(tiny), prompts, 8))
        assert got["after_warmup"] == 0
    # The last ones differ from what each row gets alone, or the above would show nothing.
    assert got["logprobs"][1] != pytest.approx(
        reference.greedy(as_new(tiny), prompts[1], 8)[1], abs=2e-3
    )


@pytest.mark.parametrize("kind", FOLLOWING)
def test_what_is_cached_keeps_the_rotation_it_was_written_with(
    workers: Any, models: Any, kind: str
) -> None:
    tiny = models(**FOLLOWING[kind])
    turns = reference.random_prompts([10, 6, 30, 2], tiny.vocab)
    got = workers[2].call(
        "device_cases:conversation",
        folder=tiny.folder,
        mesh="1x2",
        turns=[[turn] for turn in turns],
        steps=4,
        capacity=200,
    )
    assert [answers[0] for _, answers in got["answers"]] == reference.greedy_turns(
        as_new(tiny), turns, 4
    )


@pytest.mark.parametrize("kind", FOLLOWING)
def test_every_chunk_of_a_prompt_turns_by_the_whole_prompt(
    workers: Any, models: Any, kind: str
) -> None:
    rope = LONGROPE["rope_parameters"] | {"original_max_position_embeddings": 550}
    tiny = models(
        **FOLLOWING[kind] | ({"positions": 550} if kind == "dynamic" else {"rope_parameters": rope})
    )
    prompts = reference.random_prompts([600], tiny.vocab)
    got = workers[2].call(
        "device_cases:generate",
        folder=tiny.folder,
        mesh="1x2",
        prompts=prompts,
        steps=4,
        capacity=610,
    )
    assert_equal(got, [reference.greedy(as_new(tiny), prompts[0], 4)])


@pytest.mark.parametrize("kind", FOLLOWING)
def test_a_model_that_the_user_built_turns_by_the_length_too(
    workers: Any, models: Any, kind: str
) -> None:
    tiny = models(**FOLLOWING[kind])
    inputs = [reference.random_ids(2, length, tiny.vocab) for length in (12, 40, 20)]
    got = workers[2].call(
        "device_cases:forward",
        folder=tiny.folder,
        mesh="1x2",
        inputs=[{"input_ids": ids} for ids in inputs],
    )
    for logits, ids in zip(got["logits"], inputs, strict=True):
        assert reference.relative_l2(logits, reference.logits(as_new(tiny), ids)) < 1e-5


def test_logits_of_a_whole_text_turn_by_its_length_and_not_by_its_padding(
    workers: Any, models: Any
) -> None:
    tiny = models(**FOLLOWING["longrope"])
    texts = [reference.random_prompts([length], tiny.vocab)[0] for length in (20, 30)]
    got = workers[2].call("device_cases:logits_of", folder=tiny.folder, mesh="1x2", texts=texts)
    for logits, text in zip(got, texts, strict=True):
        assert (
            reference.relative_l2(logits, reference.logits(as_new(tiny), torch.tensor([text]))[0])
            < 1e-5
        )


def test_training_does_not_take_what_follows_the_length(models: Any) -> None:
    spec = ModelSpec.from_config(models(**FOLLOWING["longrope"]).model.config)
    plan = training_plan(make_plan(spec, MeshShape()), fsdp=False, lora=None)
    with pytest.raises(FitError) as caught:
        check_fit(StepOptions(batch_size=1, seq_len=8), plan)
    check_raised(caught.value, 4, "'longrope'", "default, linear, yarn, llama3")
