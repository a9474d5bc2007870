"""A forecast's figures: by hand for one model, and what must hold for all of them."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import says
from test_plan import MESHES, TINY, specs

from parallama.errors import FitError, UsageError
from parallama.model.known_configs import CONFIGS, spec_of
from parallama.model.spec import ModelSpec
from parallama.plan import cost
from parallama.plan.device_counts import MOST_DEVICES, device_counts
from parallama.plan.fit import largest
from parallama.plan.forecast import forecast
from parallama.plan.hardware import Hardware
from parallama.plan.hardware_names import find_hardware
from parallama.plan.layer_patterns import layer_patterns, ranges
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import MeshShape
from parallama.plan.program_shapes import (
    CHUNK,
    cache_buckets,
    chunk_size,
    prompt_buckets,
    run_slots,
)
from parallama.plan.request import Request
from parallama.plan.train_collectives import TrainStep
from parallama.plan.train_cost import train_memory

LLAMA_8B = spec_of(CONFIGS["llama-3.1-8b"], "llama-3.1-8b")
ON_8 = make_plan(LLAMA_8B, MeshShape(model=8))


def model_bytes(spec: ModelSpec, itemsize: int) -> int:
    return cost.parameter_count(spec) * itemsize


# -- by hand


def test_llama_3_1_8b_on_eight_devices_is_what_a_pencil_says():
    """E 4096, 32 layers, 32 query and 8 KV heads of 128, F 14336, V 128256, two bytes a number."""
    embedding = 128256 // 8 * 4096 * 2
    query = 4096 // 8 * 4096 * 2
    key = value = 1024 // 8 * 4096 * 2
    output = 4096 * (4096 // 8) * 2
    gate = up = 14336 // 8 * 4096 * 2
    down = 4096 * (14336 // 8) * 2
    norms = 2 * 4096 * 2
    layer = query + key + value + output + gate + up + down + norms
    last_norm = 4096 * 2
    head = 128256 // 8 * 4096 * 2
    params = embedding + 32 * layer + last_norm + head
    assert params == 2_008_031_232
    found = cost.memory(ON_8, batch=1, max_model_len=8192, itemsize=2)
    assert found.params == params
    # Keys and values, 32 layers, 1 row, 1 KV head a device, 128 numbers a position. Behind 8192
    # positions a chunk of 128 may end; together they are filled up to a multiple of 256.
    assert found.kv == 2 * 32 * 1 * 1 * 8448 * 128 * 2 == 138_412_032
    # Each token's count, its bias, and a prompt's; the last token, its log-probability and the next
    # position.
    assert found.state == 128256 // 8 * 4 * 3 + 8 + 4 + 4 == 192_400
    # 128 positions: E twice and the MLP's three tensors, against E, four query heads twice, one KV
    # head twice, and scores over 256 cached positions and the chunk in fp32 and bfloat16.
    mlp = 128 * (2 * 4096 + 3 * 1792) * 2
    attention = 128 * (4096 + (2 * 4 + 2 * 1) * 128) * 2 + 128 * 4 * (256 + 128) * (4 + 2)
    assert found.activations == max(mlp, attention) == 3_473_408
    assert found.logits == 128256 // 8 * 4
    assert found.total == params + found.kv + found.state + found.activations + found.logits


def test_a_training_step_of_llama_3_1_8b_is_what_a_pencil_says():
    params = 2_008_031_232
    found = train_memory(ON_8, TrainStep(batch=1, seq=512, itemsize=2))
    vectors = (2 * 32 + 1) * 4096
    assert (found.params, found.gradients) == (2 * params, 2 * params)  # the masters, and fp32 sums
    assert found.copies == params - 2 * vectors  # matrices in bfloat16, for the products
    assert found.optimizer == params // 2 * (4 + 4) + 4  # two moments, and the step's number
    layer = 512 * (4 * 4096 + (2 * 4 + 2 * 1) * 128 + 5 * 1792) * 2 + 512 * 4 * 512 * (4 + 2)
    entered, top = 512 * 4096 * 2, 13_893_632
    assert found.activations == 32 * layer + top
    assert found.activations_remat == 32 * entered + top
    assert found.logits == 512 * 16032 * (4 + 4)
    in_fp32 = train_memory(ON_8, TrainStep(batch=1, seq=512, itemsize=4))
    assert (in_fp32.params, in_fp32.optimizer, in_fp32.copies) == (found.params, found.optimizer, 0)
    # The backward pass begins with all activations and ends with all gradients; in a second
    # micro-step both are there.
    assert found.backward == layer + entered
    assert found.total == found.params + found.optimizer + found.copies + max(
        found.activations + found.logits, 2 * params + layer + entered
    )
    twice = train_memory(ON_8, TrainStep(batch=1, seq=512, itemsize=2, micro_steps=2))
    assert twice.working == found.copies + 2 * params + max(
        found.activations + found.logits, 2 * params + found.backward
    )
    half = train_memory(
        ON_8, TrainStep(batch=1, seq=512, itemsize=2, rematerialized=frozenset(range(0, 32, 2)))
    )
    assert half.activations == 16 * layer + 16 * entered + top
    assert found.activations > half.activations > found.activations_remat == half.activations_remat
    along = train_memory(ON_8, TrainStep(batch=1, seq=512, itemsize=2, sequence_parallel=True))
    assert found.activations_remat - along.activations_remat == entered * 7 // 8 * 32


def test_a_decode_step_can_be_the_peak():
    """Of many rows: each has scores of one position over a block of the cache."""
    plan = make_plan(TINY, MeshShape())
    found = cost.memory(plan, batch=512, max_model_len=1, itemsize=4)
    # E, twice the query and KV heads, and six heads' scores over the block and the new position, as
    # scores and as weights.
    assert found.activations == 512 * (4 * (24 + (2 * 6 + 2 * 2) * 4) + 6 * 257 * (4 + 4))


@given(requests=st.integers(1, 100), most=st.integers(1, 32))
def test_a_run_has_slots_for_all_that_run_and_for_no_more_than_twice_as_many(requests, most):
    found = run_slots(requests, most)
    assert requests <= found < 2 * requests + (requests == 1)
    assert found == requests or found <= most


# -- what must hold for all


@settings(deadline=None)
@given(spec=specs(), mesh=MESHES, itemsize=st.sampled_from([2, 4]))
def test_all_devices_together_hold_the_model_at_least(spec, mesh, itemsize):
    plan = make_plan(spec, mesh)
    together = sum(plan.parameter_bytes(itemsize))
    assert together >= model_bytes(spec, itemsize)
    split = sum(math.prod(p.shape) for p in plan.parameters if any(p.axes))
    whole = sum(math.prod(p.shape) for p in plan.parameters if not any(p.axes))
    assert together == itemsize * (split * mesh.data + whole * mesh.devices)
    if mesh.devices == 1:
        assert together == model_bytes(spec, itemsize)


@given(count=st.sampled_from([1, 2, 4, 8]), itemsize=st.sampled_from([2, 4]))
def test_nothing_is_wasted_where_everything_divides(count, itemsize):
    (row,) = device_counts(LLAMA_8B, [count], itemsize)
    norms = (2 * LLAMA_8B.layers + 1) * LLAMA_8B.hidden * itemsize
    assert row.extra_weight_percent == row.extra_cache_percent == 0
    assert (
        row.param_bytes_per_device * count == model_bytes(LLAMA_8B, itemsize) + (count - 1) * norms
    )


@settings(deadline=None)
@given(spec=specs(), devices=st.integers(1, 9))
def test_a_device_counts_line_agrees_with_its_whole_plan(spec, devices):
    (row,) = device_counts(spec, [devices], 4)
    plan = make_plan(spec, MeshShape(model=devices))
    assert row.param_bytes_per_device == plan.parameter_bytes(4)[0]
    everywhere = sum(math.prod(placement.shape) for placement in plan.parameters)
    assert row.extra_weight_percent == pytest.approx(
        100 * (everywhere / cost.parameter_count(spec) - 1)
    )
    assert (row.query_heads, row.kv_heads) == (
        len(plan.head_layout.query_sources),
        plan.head_layout.slots,
    )
    assert (row.intermediate, row.vocab, row.kind) == (
        plan.intermediate,
        plan.vocab,
        plan.head_layout.kind,
    )


@settings(deadline=None)
@given(
    spec=specs(),
    mesh=MESHES,
    batch=st.integers(1, 9),
    length=st.integers(1, 1000),
    seq=st.integers(1, 1000),
    room=st.integers(0, 1 << 22),
    train=st.booleans(),
)
def test_the_largest_batch_and_context_fit_and_one_more_does_not(
    spec, mesh, batch, length, seq, room, train
):
    length = min(length, spec.max_positions)
    plan = make_plan(spec, mesh)
    device = Hardware(name="some", memory_bytes=room, what="a device")
    request = Request(
        batch=batch,
        seq=min(seq, length),
        max_model_len=length,
        dtype="float32",
        train=TrainStep(batch=1, seq=1) if train else None,
        hardware=device,
    )
    fit = forecast("a model", plan, request).fit

    def fits(**changes: int) -> bool:
        changed = replace(request, **changes)
        if train:
            return train_memory(plan, TrainStep(batch=changed.batch, seq=changed.seq)).total <= room
        return (
            cost.memory(
                plan,
                batch=changed.batch,
                max_model_len=changed.max_model_len,
                itemsize=4,
            ).total
            <= room
        )

    def at(context: int) -> dict[str, int]:
        return {"seq": context} if train else {"max_model_len": context}

    assert fit is not None and fit.fits == fits()
    assert fit.largest_batch == 0 or fits(batch=fit.largest_batch)
    assert not fits(batch=fit.largest_batch + 1)
    assert fit.largest_context == 0 or fits(**at(fit.largest_context))
    assert fit.largest_context == spec.max_positions or not fits(**at(fit.largest_context + 1))


@given(limit=st.integers(0, 10_000), most=st.none() | st.integers(1, 10_000))
def test_largest_finds_the_last_that_fits(limit, most):
    assert largest(lambda number: number <= limit, most) == (
        limit if most is None else min(limit, most)
    )


@given(
    longest=st.integers(1, 5000),
    capacity=st.integers(1, 20_000),
    rows=st.sampled_from((1, 7, 8, 32)),
)
def test_a_prompts_buckets_hold_its_chunks_and_end_with_the_capacity(longest, capacity, rows):
    chunks = math.ceil(longest / chunk_size(longest)) * chunk_size(longest)
    buckets = prompt_buckets(capacity, longest, rows=rows)
    assert chunk_size(longest) <= CHUNK
    assert buckets[0] >= chunks >= longest and buckets[-1] >= capacity
    assert buckets == sorted(set(buckets))
    assert (
        buckets[-1]
        == cache_buckets(max(capacity, chunks), rows=rows)[-1]
        < max(capacity, chunks) + (256 if rows < 8 else 64)
    )


# -- kinds


def test_every_parameter_is_of_one_kind():
    found = layer_patterns(ON_8)
    assert sum(kind.count for kind in found) == len(ON_8.parameters) == 32 * 9 + 3
    assert [kind.name for kind in found][:2] == [
        "model.embed_tokens.weight",
        "model.layers.*.self_attn.q_proj.weight",
    ]
    assert found[1].title == "layers.*.self_attn.q_proj.weight x32"
    assert found[1].module == "model.layers.*.self_attn.q_proj"


def test_layers_that_lie_differently_are_kinds_of_their_own_below_one_another():
    overrides = {
        "model.layers.0.mlp.up_proj.weight": "replicate",
        "model.layers.2.mlp.up_proj.weight": "replicate",
    }
    plan = make_plan(replace(TINY, layers=6), MeshShape(model=2), overrides)
    names = [(kind.name, kind.count) for kind in layer_patterns(plan) if "up_proj" in kind.name]
    # The two have patterns, and so reasons, of their own.
    assert names == [
        ("model.layers.0.mlp.up_proj.weight", 1),
        ("model.layers.1,3-5.mlp.up_proj.weight", 4),
        ("model.layers.2.mlp.up_proj.weight", 1),
    ]


def test_runs_of_numbers_are_short():
    assert (ranges([3]), ranges([0, 1]), ranges([0, 2, 3, 4, 9]), ranges([])) == (
        "3",
        "0-1",
        "0,2-4,9",
        "",
    )


# -- hardware and requests


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch": 0}, "--batch is 0\nexpected 1 to 1048576"),
        (
            {"max_model_len": 131073},
            "--max-model-len is 131073\nexpected 1 to 131072, the model's maximum",
        ),
        ({"max_model_len": 0}, "--max-model-len is 0\nexpected 1 to 131072, the model's maximum"),
        ({"seq": 1025}, "--seq is 1025\nexpected 1 to 1024, the maximum length"),
        ({"seq": 0}, "--seq is 0\nexpected 1 to 1024, the maximum length"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_limits(changes, expected):
    request = Request(
        **({"batch": 1, "seq": 16, "max_model_len": 1024, "dtype": "float32"} | changes)
    )
    with pytest.raises(UsageError) as caught:
        forecast("a model", ON_8, request)
    assert str(caught.value) == expected


def test_what_does_not_fit_says_by_how_much_and_what_would():
    request = Request(
        batch=64, seq=512, max_model_len=8192, dtype="bfloat16", hardware=find_hardware("n300")
    )
    found = forecast("llama-3.1-8b", make_plan(LLAMA_8B, MeshShape(model=4)), request)
    with pytest.raises(FitError) as caught:
        found.check()
    assert found.fit is not None
    sizes = ("mesh 1x4", "21.8 GB", "n300", "12 GB", "'model'")
    limits = (f" {found.fit.largest_batch} ", f" {found.fit.largest_context} ")
    assert says(caught.value, "llama-3.1-8b", *sizes, *limits)
    assert 1 <= found.fit.largest_batch < 64 and 1 <= found.fit.largest_context < 8192
    forecast("fits", found.plan, replace(request, batch=found.fit.largest_batch)).check()


def test_where_nothing_fits_there_is_no_largest():
    request = Request(
        batch=1, seq=512, max_model_len=8192, dtype="bfloat16", hardware=find_hardware("n150")
    )
    with pytest.raises(FitError, match="\nno batch and no context fits\n"):
        forecast("llama-3.1-8b", make_plan(LLAMA_8B, MeshShape()), request).check()


def test_the_device_counts_show_division_repetition_and_padding():
    rows = forecast(
        "m", ON_8, Request(batch=1, seq=1, max_model_len=1, dtype="float32")
    ).device_counts
    assert [row.devices for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert [row.kind for row in rows] == ["divide"] * 4 + ["repeat"] * 2 + ["repeat+pad"]
    odd = forecast(
        "m",
        make_plan(LLAMA_8B, MeshShape(model=7)),
        Request(batch=1, seq=1, max_model_len=1, dtype="float32"),
    )
    assert (
        7 in [row.devices for row in odd.device_counts]
        and max(row.devices for row in odd.device_counts) == MOST_DEVICES
    )
