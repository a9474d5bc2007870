"""Sharded equals unsharded: tiny random models on virtual devices against plain transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

OPTIMIZE = True  # of the workers' programs

# Query/KV heads that divide and that don't; 37 and 101 divide by none of the device counts.
# One layer each: the tests of prefill and decode have two.
LLAMAS: dict[str, dict[str, Any]] = {
    "4/4": {"layers": 1, "heads": 4, "kv_heads": 4},
    "8/2 tied": {"layers": 1, "heads": 8, "kv_heads": 2, "tied": True},
    "9/3 tied, attention biases": {
        "layers": 1,
        "heads": 9,
        "kv_heads": 3,
        "tied": True,
        "attention_bias": True,
    },
    "6/2 MLP biases": {"layers": 1, "heads": 6, "kv_heads": 2, "mlp_bias": True},
    "5/1 tied": {
        "layers": 1,
        "heads": 5,
        "kv_heads": 1,
        "tied": True,
        "intermediate": 48,
        "vocab": 67,
    },
    "7/7 both biases": {
        "layers": 1,
        "heads": 7,
        "kv_heads": 7,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "12/4": {"layers": 1, "heads": 12, "kv_heads": 4, "head_dim": 4, "intermediate": 61},
    "40/8": {"layers": 1, "heads": 40, "kv_heads": 8, "head_dim": 4},
}
SMOL = {"heads": 9, "kv_heads": 3, "tied": True}
DIVIDES = {"heads": 16, "kv_heads": 8, "head_dim": 4, "intermediate": 48, "vocab": 96}


def devices(mesh: str) -> int:
    return math.prod(int(size) for size in mesh.split("x"))


def assert_equal_logits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    assert reference.relative_l2(got, wanted) < 1e-5
    assert reference.pcc(got, wanted) >= 0.999999


def assert_greedy(
    tiny: reference.Tiny, got: dict[str, Any], prompts: list[list[int]], steps: int
) -> None:
    for row, prompt in enumerate(prompts):
        tokens, logprobs = reference.greedy(tiny.model, prompt, steps)
        assert got["tokens"][row] == tokens, f"row {row}"
        assert got["logprobs"][row] == pytest.approx(logprobs, abs=2e-4), f"row {row}"
    assert got["after_warmup"] == 0


# -- transformers' own forward, sharded


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        # Each once on eight devices, or on the three that most head counts don't divide over; and
        # some on every other shape.
        *((name, ("1x3", "1x8")[index % 2]) for index, name in enumerate(LLAMAS)),
        ("7/7 both biases", "1x2"),
        ("5/1 tied", "1x4"),
        ("12/4", "1x1"),
        *(("9/3 tied, attention biases", mesh) for mesh in ("2x4", "8x1")),
        *(
            pytest.param(name, ("1x8", "1x3")[index % 2], marks=pytest.mark.slow)
            for index, name in enumerate(LLAMAS)
        ),
        *(
            pytest.param(name, mesh, marks=pytest.mark.slow)
            for name in ("4/4", "9/3 tied, attention biases")
            for mesh in ("1x4", "4x2")
        ),
    ],
)
def test_a_sharded_forward_gives_the_same_logits_and_takes_the_planned_bytes(
    workers: Any, models: Any, name: str, mesh: str
) -> None:
    tiny = models(**LLAMAS[name])
    ids = reference.random_ids(8, 19, tiny.vocab)
    got = workers[devices(mesh)].call(
        "device_cases:forward", folder=tiny.folder, mesh=mesh, inputs=[{"input_ids": ids}]
    )
    assert_equal_logits(got["logits"][0], reference.logits(tiny.model, ids))
    assert got["measured"] == got["planned"]


@pytest.mark.parametrize("mesh", ["1x1", "1x3", "2x4"])
def test_one_row_and_padded_rows_give_the_same_logits(workers: Any, models: Any, mesh: str) -> None:
    tiny = models(**SMOL)
    one, two = (
        reference.random_ids(1, 12, tiny.vocab),
        reference.random_ids(2, 12, tiny.vocab, seed=1),
    )
    right = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    left = right.flip(1)
    got = workers[devices(mesh)].call(
        "device_cases:forward",
        folder=tiny.folder,
        mesh=mesh,
        inputs=[
            {"input_ids": one},
            {"input_ids": two, "attention_mask": right},
            {"input_ids": two, "attention_mask": left},
        ],
    )["logits"]
    assert_equal_logits(got[0], reference.logits(tiny.model, one))
    for result, mask in ((got[1], right), (got[2], left)):
        seen = mask.bool()  # what a padding position answers means nothing
        assert_equal_logits(result[seen], reference.logits(tiny.model, two, mask)[seen])


@pytest.mark.parametrize("mesh", ["1x1", "1x8"])
def test_bf16_logits_follow_the_fp32_model(workers: Any, models: Any, mesh: str) -> None:
    tiny = models(**SMOL)
    ids = reference.random_ids(2, 19, tiny.vocab)
    got = workers[devices(mesh)].call(
        "device_cases:forward",
        folder=tiny.folder,
        mesh=mesh,
        inputs=[{"input_ids": ids}],
        dtype="bfloat16",
    )
    assert reference.pcc(got["logits"][0], reference.logits(tiny.model, ids)) >= 0.999
    assert got["measured"] == got["planned"]


@pytest.mark.parametrize(
    "mesh", ["1x4", "2x4", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1x1", "1x8"))]
)
def test_gradients_equal_the_single_device_ones_where_heads_divide(
    workers: Any, models: Any, mesh: str
) -> None:
    tiny = models(**DIVIDES, seed=5)
    ids = reference.random_ids(2, 11, tiny.vocab)
    got = workers[devices(mesh)].call(
        "device_cases:gradients", folder=tiny.folder, mesh=mesh, ids=ids
    )
    tiny.model.zero_grad()
    loss = tiny.model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()  # in this process, which has no XLA device
    assert got["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    wanted = {name: parameter.grad for name, parameter in tiny.model.named_parameters()}
    assert got["gradients"].keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert reference.relative_l2(got["gradients"][name], gradient) < 1e-4, name


def test_every_device_holds_an_eighth_of_a_dividing_model_and_the_norms(
    workers: Any, models: Any
) -> None:
    tiny = models(**DIVIDES)
    got = workers[8].call(
        "device_cases:generate", folder=tiny.folder, mesh="1x8", prompts=[[1]], steps=1
    )
    sizes = {name: parameter.numel() * 4 for name, parameter in tiny.model.named_parameters()}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert got["measured"] == [(sum(sizes.values()) - norms) // 8 + norms] * 8 == got["planned"]
    assert (
        got["cache_measured"] == [2 * 2 * 256 * 4 * 4] * 8
    )  # keys and values, 2 layers, one head of 256 positions of 4 floats


# -- prefill and decode


@pytest.mark.parametrize(
    "mesh",
    [
        "1x2",
        "2x4",
        "8x1",
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("1x1", "1x3", "1x8", "4x2")),
    ],
)
def test_a_ragged_batch_continues_as_transformers_does(
    workers: Any, models: Any, mesh: str
) -> None:
    tiny = models(**SMOL)
    prompts = reference.random_prompts([3, 20, 1, 16], tiny.vocab)
    got = workers[devices(mesh)].call(
        "device_cases:generate", folder=tiny.folder, mesh=mesh, prompts=prompts, steps=8
    )
    assert_greedy(tiny, got, prompts, 8)
    assert got["measured"] == got["planned"]


@pytest.mark.parametrize("mesh", ["4x2", pytest.param("1x2", marks=pytest.mark.slow)])
def test_a_row_of_a_batch_gets_what_it_gets_alone(workers: Any, models: Any, mesh: str) -> None:
    tiny = models(**SMOL)
    prompts = reference.random_prompts([3, 20, 1, 16], tiny.vocab)
    worker = workers[devices(mesh)]
    together = worker.call(
        "device_cases:generate", folder=tiny.folder, mesh=mesh, prompts=prompts, steps=8
    )
    for row, prompt in enumerate(prompts):
        # The same chunk size for all, so that one program serves the four.
        alone = worker.call(
            "device_cases:generate",
            folder=tiny.folder,
            mesh=mesh,
            prompts=[prompt],
            steps=8,
            longest_prompt=20,
        )
        assert alone["tokens"][0] == together["tokens"][row]
        assert alone["logprobs"][0] == pytest.approx(together["logprobs"][row], abs=2e-5)


@pytest.mark.parametrize("mesh", ["2x4", pytest.param("1x3", marks=pytest.mark.slow)])
def test_prompts_longer_than_a_chunk_continue_as_transformers_does(
    workers: Any, models: Any, mesh: str
) -> None:
    tiny = models(**SMOL)
    prompts = reference.random_prompts([700, 5, 513, 512], tiny.vocab)
    got = workers[devices(mesh)].call(
        "device_cases:generate",
        folder=tiny.folder,
        mesh=mesh,
        prompts=prompts,
        steps=5,
        capacity=705,
    )
    assert got["buckets"] == [1024]
    assert_greedy(tiny, got, prompts, 5)


@pytest.mark.parametrize("mesh", ["4x2", pytest.param("1x1", marks=pytest.mark.slow)])
def test_the_cache_grows_without_a_trace_in_the_text(workers: Any, models: Any, mesh: str) -> None:
    tiny = models(**SMOL)
    prompts = reference.random_prompts([250, 3], tiny.vocab)
    got = workers[devices(mesh)].call(
        "device_cases:generate",
        folder=tiny.folder,
        mesh=mesh,
        prompts=prompts,
        steps=12,
        capacity=1100,
    )
    assert got["buckets"] == [256, 512, 1280]
    assert_greedy(tiny, got, prompts, 12)


@pytest.mark.parametrize("mesh", ["4x2", pytest.param("1x3", marks=pytest.mark.slow)])
def test_a_continued_session_computes_only_what_is_new_and_answers_the_same(
    workers: Any, models: Any, mesh: str
) -> None:
    tiny = models(**SMOL)
    first, second, third = (
        reference.random_prompts(lengths, tiny.vocab, seed=n)
        for n, lengths in enumerate(([9, 40], [4, 1], [70, 3]))
    )
    # In the last turn the second row takes back seven tokens.
    turns = [first, second, [third[0], [-7, *third[1]]]]
    got = workers[devices(mesh)].call(
        "device_cases:conversation",
        folder=tiny.folder,
        mesh=mesh,
        turns=turns,
        steps=5,
        capacity=400,
    )
    for texts, answers in got["answers"]:
        for text, answer in zip(texts, answers, strict=True):
            assert answer == reference.greedy(tiny.model, text, 5)[0]
    # The last token of an answer was never run: it is new too.
    assert got["computed"] == [49, 4 + 1 + 2, 70 + 3 + 1]
    assert got["after_warmup"] == 0


def test_a_continued_session_takes_new_text_longer_than_a_chunk(workers: Any, models: Any) -> None:
    tiny = models(**SMOL)
    turns = [
        reference.random_prompts([30, 3], tiny.vocab),
        reference.random_prompts([600, 2], tiny.vocab, seed=1),
    ]
    got = workers[2].call(
        "device_cases:conversation",
        folder=tiny.folder,
        mesh="1x2",
        turns=turns,
        steps=3,
        capacity=1100,
    )
    for texts, answers in got["answers"]:
        for text, answer in zip(texts, answers, strict=True):
            assert answer == reference.greedy(tiny.model, text, 3)[0]
    assert got["after_warmup"] == 0


def test_rows_of_a_continued_session_may_differ_in_how_much_is_new(
    workers: Any, models: Any
) -> None:
    tiny = models(**SMOL)
    turns = [
        reference.random_prompts([380, 5], tiny.vocab),
        reference.random_prompts([3, 370], tiny.vocab, seed=1),
    ]
    # No row ever needs more than the 400 positions that the session is made for.
    got = workers[2].call(
        "device_cases:conversation",
        folder=tiny.folder,
        mesh="1x2",
        turns=turns,
        steps=3,
        capacity=400,
    )
    for texts, answers in got["answers"]:
        for text, answer in zip(texts, answers, strict=True):
            assert answer == reference.greedy(tiny.model, text, 3)[0]


@pytest.mark.parametrize("repeats", [1, 6])
def test_a_row_past_its_end_is_frozen_and_can_go_on_with_any_text(
    workers: Any, models: Any, repeats: int
) -> None:
    tiny = models(**SMOL)
    prompts = reference.random_prompts([3, 20], tiny.vocab)
    eos = reference.greedy(tiny.model, prompts[0], 3)[0][2]
    # With 6, the first row goes on with the end id as often as the session repeated it: only the
    # first of them was run.
    got = workers[1].call(
        "device_cases:frozen_rows",
        folder=tiny.folder,
        mesh="1x1",
        prompts=prompts,
        eos=eos,
        steps=8,
        repeats=repeats,
        added=[5, 6],
    )
    assert got["first"][0][2:] == [eos] * 6
    for text, token in zip(got["texts"], got["next"], strict=True):
        assert token == reference.greedy(tiny.model, text, 1)[0][0]


# -- other families, as the user built them (tests/test_families.py has their prefill and decode)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"heads": 6, "kv_heads": 2, "tied": True},
    "qwen3": {"heads": 9, "kv_heads": 3},
    "mistral": {"heads": 4, "kv_heads": 2, "sliding_window": 11},
    "smollm3": {"heads": 6, "kv_heads": 2, "tied": True, "no_rope_layer_interval": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_give_the_same_logits(workers: Any, models: Any, family: str) -> None:
    tiny = models(family=family, **FAMILIES[family])
    ids = reference.random_ids(2, 40, tiny.vocab)
    got = workers[4].call(
        "device_cases:forward", folder=tiny.folder, mesh="1x4", inputs=[{"input_ids": ids}]
    )
    assert_equal_logits(got["logits"][0], reference.logits(tiny.model, ids))


@pytest.mark.parametrize("mesh", ["1x1", pytest.param("1x4", marks=pytest.mark.slow)])
def test_a_sliding_window_holds_over_chunks_and_turns(workers: Any, models: Any, mesh: str) -> None:
    tiny = models(family="mistral", **FAMILIES["mistral"])
    turns = [
        reference.random_prompts([30, 3], tiny.vocab),
        reference.random_prompts([600, 2], tiny.vocab, seed=1),
    ]
    got = workers[devices(mesh)].call(
        "device_cases:conversation",
        folder=tiny.folder,
        mesh=mesh,
        turns=turns,
        steps=3,
        capacity=1100,
    )
    for texts, answers in got["answers"]:
        for text, answer in zip(texts, answers, strict=True):
            assert answer == reference.greedy(tiny.model, text, 3)[0]


# -- any sizes


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Heads, biases, ties and sizes of a one-layer Llama."""
    kv_heads = draw(st.integers(1, 6))
    return {
        "heads": kv_heads * draw(st.integers(1, 5)),
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 4, 10])),
        "intermediate": draw(st.integers(3, 70)),
        "vocab": draw(st.integers(17, 120)),
        "layers": 1,
        "tied": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }


def check_any_sizes(workers: Any, models: Any, mesh: str, drawn: dict[str, Any]) -> None:
    tiny = models(**drawn)
    prompts = reference.random_prompts([2, 9], tiny.vocab)
    got = workers[devices(mesh)].call(
        "device_cases:generate", folder=tiny.folder, mesh=mesh, prompts=prompts, steps=4
    )
    assert_greedy(tiny, got, prompts, 4)
    assert got["measured"] == got["planned"]


@pytest.mark.parametrize("mesh", ["1x2", "1x3", "2x4"])
@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(drawn=sizes())
def test_models_of_any_sizes_continue_as_transformers_does(
    workers: Any, models: Any, mesh: str, drawn: dict[str, Any]
) -> None:
    check_any_sizes(workers, models, mesh, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "1x2", "1x3", "1x4", "2x2", "1x8", "2x4", "4x2"])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(drawn=sizes())
def test_many_models_of_any_sizes_continue_as_transformers_does(
    workers: Any, models: Any, mesh: str, drawn: dict[str, Any]
) -> None:
    check_any_sizes(workers, models, mesh, drawn)


@pytest.mark.parametrize("mesh", ["1x1", "1x3", "2x4"])
def test_parameters_come_back_from_the_devices_bit_equal(
    workers: Any, models: Any, mesh: str
) -> None:
    tiny = models(**SMOL)
    back = workers[devices(mesh)].call("device_cases:gathered", folder=tiny.folder, mesh=mesh)
    theirs = dict(tiny.model.named_parameters())
    assert back.keys() == theirs.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[name].detach()), name
