"""The collectives that a plan must cause, by the theory of tensor parallelism."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised
from test_plan import MESHES, TINY, specs

from parallama.errors import PlanError
from parallama.plan.collectives import Collective, expected_collectives
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import DATA, MODEL, MeshShape
from parallama.plan.train_collectives import TrainStep, expected_in_training

REDUCED = 3 * 5 * 24 * 4  # rows of one device, positions, hidden, bytes


def found(mesh: MeshShape, phase="prefill", overrides=None, spec=TINY) -> list[Collective]:
    return list(
        expected_collectives(
            make_plan(spec, mesh, overrides), phase, batch=6, positions=5, itemsize=4
        )
    )


def item(kind: str, axis: str, count: int, size: int, module: str) -> Collective:
    return Collective(kind=kind, axis=axis, count=count, bytes=size, module=module)


def test_a_prefill_sums_after_the_embedding_and_twice_a_layer_and_gathers_candidates():
    """In the last layer only the last positions are summed."""
    assert found(MeshShape(data=2, model=2)) == [
        item("all-reduce", MODEL, 1, REDUCED, "model.embed_tokens"),
        item("all-reduce", MODEL, 1, REDUCED, "model.layers.0.self_attn.o_proj"),
        item("all-reduce", MODEL, 1, REDUCED, "model.layers.0.mlp.down_proj"),
        item("all-reduce", MODEL, 1, REDUCED // 5, "model.layers.1.self_attn.o_proj"),
        item("all-reduce", MODEL, 1, REDUCED // 5, "model.layers.1.mlp.down_proj"),
        item("all-gather", MODEL, 1, 3 * 2 * 5 * 4, "sampling"),
        item("all-reduce", MODEL, 2, 3 * 15 * 4, "sampling.truncation"),
        item("all-reduce", MODEL, 2, 3 * 4, "sampling.truncation"),
        item("all-reduce", MODEL, 2, 3 * 2 * 20 * 4, "sampling.top_logprobs"),
    ]


def test_a_decode_step_sums_one_position():
    sums = [c for c in found(MeshShape(data=2, model=2), "decode") if "sampling" not in c.module]
    assert [c.bytes for c in sums] == [3 * 24 * 4] * 3


def test_training_sums_gradients_once_over_data_and_inputs_gradients_twice_a_layer_over_model():
    plan = make_plan(TINY, MeshShape(data=2, model=2))
    training = expected_in_training(plan, TrainStep(batch=6, seq=5, micro_steps=3))
    assert [(c.module, c.kind, c.count) for c in training if c.axis == MODEL] == [
        ("model.embed_tokens", "all-reduce", 3),
        ("model.layers.*.self_attn.o_proj", "all-reduce", 6),
        ("model.layers.*.self_attn (backward)", "all-reduce", 6),
        ("model.layers.*.mlp.down_proj", "all-reduce", 6),
        ("model.layers.*.mlp (backward)", "all-reduce", 6),
        ("loss", "all-reduce", 3),
        ("loss", "all-reduce", 3),
        ("lm_head (backward)", "all-reduce", 3),
    ]
    gradients = [c for c in training if c.axis == DATA]
    assert sum(c.count * c.bytes for c in gradients) == plan.parameter_bytes(4)[0]


def test_sequence_parallelism_scatters_and_gathers_what_is_summed_without_it():
    plan = make_plan(TINY, MeshShape(model=2))
    plain, along = (
        expected_in_training(plan, TrainStep(batch=2, seq=6, sequence_parallel=on))
        for on in (False, True)
    )
    stream = 2 * 6 * 24 * 4
    summed = sum(c.count for c in plain if c.bytes == stream)
    assert {c.kind for c in along if c.bytes == stream} == {"all-gather"}
    assert (
        sum(c.count for c in along if c.kind == "reduce-scatter" and c.bytes == stream // 2)
        == summed
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.layers.1.mlp.up_proj.weight": "replicate"},
        {"model.embed_tokens.weight": [None, MODEL]},
    ],
)
def test_a_plan_that_training_does_not_follow_is_refused_with_its_name(overrides):
    plan = make_plan(TINY, MeshShape(model=2), overrides)
    with pytest.raises(PlanError) as caught:
        expected_in_training(plan, TrainStep(batch=2, seq=6))
    check_raised(caught.value, 2, *overrides)


@settings(deadline=None)
@given(spec=specs(), mesh=MESHES, phase=st.sampled_from(["prefill", "decode"]))
def test_an_axis_of_one_device_has_no_collectives(spec, mesh, phase):
    for each in found(mesh, phase, spec=spec):
        assert mesh.size(each.axis) > 1 and each.count > 0 and each.bytes > 0


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_replicated_needs_no_sum(tied):
    spec = replace(TINY, tied=tied)
    overrides = {
        "model.embed_tokens.weight": "replicate",
        "model.layers.1.mlp.down_proj.weight": "replicate",
    }
    modules = {
        c.module: c.count
        for c in found(MeshShape(model=2), "decode", overrides=overrides, spec=spec)
    }
    assert "model.embed_tokens" not in modules
    assert (
        modules["model.layers.0.mlp.down_proj"] == 1
        and modules["model.layers.*.self_attn.o_proj"] == 2
    )
    assert modules["sampling"] == 1  # logits are split for the pick, whatever the head


def test_a_weight_split_over_data_is_gathered_there():
    overrides = {"model.layers.*.mlp.up_proj.weight": [MODEL, DATA]}
    (gathered,) = [
        c for c in found(MeshShape(data=2, model=2), overrides=overrides) if c.axis == DATA
    ]
    assert gathered == item("all-gather", DATA, 2, 40 // 2 * 24 * 4, "model.layers.*.mlp.up_proj")
