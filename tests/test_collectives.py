"""The collectives that a plan must cause, by the theory of tensor parallelism."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import MESHES, TINY, specs

from parallama.collectives import Collective, expected
from parallama.plan import make_plan
from parallama.topology import DATA, MODEL, MeshShape

REDUCED = 3 * 5 * 24 * 4  # rows of one device, positions, hidden, bytes


def found(mesh: MeshShape, phase="prefill", overrides=None, spec=TINY) -> list[Collective]:
    return list(expected(make_plan(spec, mesh, overrides), phase, batch=6, positions=5, itemsize=4))


def item(kind: str, axis: str, count: int, size: int, module: str) -> Collective:
    return Collective(kind=kind, axis=axis, count=count, bytes=size, module=module)


def test_a_prefill_sums_after_the_embedding_and_twice_a_layer_and_gathers_candidates():
    assert found(MeshShape(data=2, model=2)) == [
        item("all-reduce", MODEL, 1, REDUCED, "model.embed_tokens"),
        item("all-reduce", MODEL, 2, REDUCED, "model.layers.*.self_attn.o_proj"),
        item("all-reduce", MODEL, 2, REDUCED, "model.layers.*.mlp.down_proj"),
        item("all-gather", MODEL, 1, 3 * 2 * 5 * 4, "sampling"),
    ]


def test_a_decode_step_sums_one_position():
    assert [c.bytes for c in found(MeshShape(data=2, model=2), "decode")] == [3 * 24 * 4] * 3 + [3 * 2 * 5 * 4]


def test_training_sums_gradients_over_data_and_inputs_gradients_over_model():
    by_axis = {axis: [c for c in found(MeshShape(data=2, model=2), "train") if c.axis == axis] for axis in (DATA, MODEL)}
    assert [(c.module, c.count) for c in by_axis[MODEL]] == [
        ("model.embed_tokens", 1),
        ("model.layers.*.self_attn.o_proj", 2),
        ("model.layers.*.mlp.down_proj", 2),
        ("loss", 3),
        ("model.layers.*.self_attn (backward)", 2),
        ("model.layers.*.mlp (backward)", 2),
        ("lm_head (backward)", 1),
    ]
    gradients = [c for c in by_axis[DATA] if c.module.endswith("(gradient)")]
    assert sum(c.count * c.bytes for c in gradients) == make_plan(TINY, MeshShape(data=2, model=2)).parameter_bytes(4)[0]


@settings(deadline=None)
@given(spec=specs(), mesh=MESHES, phase=st.sampled_from(["prefill", "decode", "train"]))
def test_an_axis_of_one_device_has_no_collectives(spec, mesh, phase):
    for each in found(mesh, phase, spec=spec):
        assert mesh.size(each.axis) > 1 and each.count > 0 and each.bytes > 0


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_replicated_needs_no_sum(tied):
    spec = replace(TINY, tied=tied)
    overrides = {"model.embed_tokens.weight": "replicate", "model.layers.1.mlp.down_proj.weight": "replicate"}
    modules = {c.module: c.count for c in found(MeshShape(model=2), overrides=overrides, spec=spec)}
    assert "model.embed_tokens" not in modules
    assert modules["model.layers.0.mlp.down_proj"] == 1 and modules["model.layers.*.self_attn.o_proj"] == 2
    assert modules["sampling"] == 1  # logits are split for the pick, whatever the head


def test_a_weight_split_over_data_is_gathered_there():
    overrides = {"model.layers.*.mlp.up_proj.weight": [MODEL, DATA]}
    (gathered,) = [c for c in found(MeshShape(data=2, model=2), overrides=overrides) if c.axis == DATA]
    assert gathered == item("all-gather", DATA, 2, 40 // 2 * 24 * 4, "model.layers.*.mlp.up_proj")
