"""A mesh shape is an ordered mapping of axes: what holds of devices holds for any axes it has."""

import copy
import json
import math
import pickle
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import TINY

from parallama.errors import FitError, UsageError
from parallama.plan import mesh_shape
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import AXES, DATA, MODEL, MeshShape
from parallama.plan.picture import colour, device_rows, directions, draw, parts, planned
from parallama.plan.placement import Plan
from parallama.train.manifest import Manifest, TensorEntry

STAGE = "stage"
SIZES = st.integers(1, 6)
MESHES = st.builds(MeshShape, data=SIZES, model=SIZES)


@st.composite
def tensors(draw):
    """A mesh, and the shape and axes of a tensor that divides over it."""
    mesh = draw(MESHES)
    split = draw(st.lists(st.sampled_from(AXES), unique=True))
    axes = draw(st.permutations([*split, *[None] * draw(st.integers(0, 2))]))
    shape = [mesh.size(axis) * draw(st.integers(1, 3)) for axis in axes]
    return mesh, tuple(shape), tuple(axes)


@pytest.fixture
def three_axes(monkeypatch):
    """As if a third axis had been declared."""
    monkeypatch.setattr(mesh_shape, "AXES", (STAGE, *AXES))
    return MeshShape(stage=2, data=3, model=4)


def elements(shape, slices) -> set[tuple[int, ...]]:
    return set(
        product(*(range(*part.indices(size)) for part, size in zip(slices, shape, strict=True)))
    )


# -- devices


@settings(deadline=None)
@given(mesh=MESHES)
def test_coordinates_and_device_numbers_are_inverse(mesh):
    places = [mesh.coordinates(device) for device in range(mesh.devices)]
    assert [mesh.device(place) for place in places] == list(range(mesh.devices))
    assert {tuple(place.items()) for place in places} == {
        tuple(zip(mesh, place, strict=True)) for place in product(*map(range, mesh.values()))
    }


@settings(deadline=None)
@given(mesh=MESHES, axes=st.lists(st.sampled_from(AXES), unique=True))
def test_groups_part_the_devices_and_differ_along_their_axes_only(mesh, axes):
    groups = mesh.groups(*axes)
    assert sorted(device for group in groups for device in group) == list(range(mesh.devices))
    assert {len(group) for group in groups} == {math.prod(mesh[axis] for axis in axes)}
    for group in groups:
        places = [mesh.coordinates(device) for device in group]
        assert all(len({place[axis] for place in places}) == 1 for axis in set(mesh) - set(axes))
        assert group == sorted(group)


@settings(deadline=None)
@given(case=tensors())
def test_devices_with_one_holder_hold_the_same_slices_and_others_other_ones(case):
    mesh, shape, axes = case
    holders = mesh.holders(axes)
    slices = [mesh.local_slices(shape, axes, device) for device in range(mesh.devices)]
    for device, holder in enumerate(holders):
        assert holder <= device
        assert slices[device] == slices[holder]
    assert len({str(part) for part in slices}) == len(set(holders))
    assert list(mesh.first_holders(axes)) == sorted(set(holders))


@settings(deadline=None)
@given(case=tensors())
def test_the_first_holders_parts_cover_a_tensor_once(case):
    mesh, shape, axes = case
    covered = Counter(
        element
        for device in mesh.first_holders(axes)
        for element in elements(shape, mesh.local_slices(shape, axes, device))
    )
    assert set(covered.values()) == {1}
    assert len(covered) == math.prod(shape)


@settings(deadline=None)
@given(case=tensors())
def test_a_drawn_part_is_the_slice_of_its_devices(case):
    mesh, shape, axes = case
    for part in parts(axes, mesh):
        for device in part.devices:
            slices = mesh.local_slices(shape, axes, device)
            assert [
                (first * size, last * size)
                for (first, last), size in zip(part.spans, shape, strict=True)
            ] == [(each.start, each.stop) for each in slices]


def test_a_dim_that_does_not_divide_is_an_error_that_names_size_axis_and_devices():
    with pytest.raises(FitError) as caught:
        MeshShape(data=2, model=4).local_slices((8, 6), (DATA, MODEL), 0)
    assert all(each in str(caught.value) for each in ("6", "'model'", "4"))


# -- the mapping


@settings(deadline=None)
@given(mesh=MESHES)
def test_a_shape_is_a_mapping_of_all_axes_in_their_order(mesh):
    assert tuple(mesh) == AXES
    assert list(mesh.values()) == [mesh.data, mesh.model]
    assert MeshShape(reversed(mesh.items())) == MeshShape(**mesh) == MeshShape(mesh) == mesh
    assert tuple(MeshShape(reversed(mesh.items()))) == AXES


@settings(deadline=None)
@given(mesh=MESHES)
def test_a_shape_survives_copying_pickling_and_json(mesh):
    @dataclass
    class Holder:
        mesh: MeshShape

    for again in (
        copy.copy(mesh),
        copy.deepcopy(mesh),
        pickle.loads(pickle.dumps(mesh)),
        MeshShape(json.loads(json.dumps(mesh))),
        asdict(Holder(mesh))["mesh"],
    ):
        assert type(again) is MeshShape
        assert again == mesh and hash(again) == hash(mesh)
    assert list(json.loads(json.dumps(mesh))) == ["data", "model"]
    assert eval(repr(mesh)) == mesh


@settings(deadline=None)
@given(one=MESHES, other=MESHES)
def test_equal_shapes_have_equal_hashes(one, other):
    assert (one == other) == (tuple(one.items()) == tuple(other.items()))
    assert one != other or hash(one) == hash(other)
    assert len({one, other}) == (1 if one == other else 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda mesh: mesh.__setitem__(DATA, 8),
        lambda mesh: mesh.__delitem__(DATA),
        lambda mesh: mesh.__ior__({DATA: 8}),
        lambda mesh: mesh.update({DATA: 8}),
        lambda mesh: mesh.setdefault("rows", 8),
        lambda mesh: mesh.pop(DATA),
        lambda mesh: mesh.popitem(),
        lambda mesh: mesh.clear(),
        lambda mesh: setattr(mesh, "data", 8),
    ],
)
def test_a_shape_cannot_be_changed(change):
    mesh = MeshShape(data=2, model=4)
    with pytest.raises((TypeError, AttributeError)):
        change(mesh)
    assert dict(mesh) == {DATA: 2, MODEL: 4}


@pytest.mark.parametrize(
    "make",
    [
        lambda: MeshShape({DATA: 2}, data=2),
        lambda: MeshShape(data=2, batch=2),
        lambda: MeshShape({"model": 2, "tp": 4}),
    ],
)
def test_an_axis_that_is_named_twice_is_an_error(make):
    with pytest.raises(UsageError, match="twice"):
        make()


# -- a third axis


def test_a_third_axis_needs_no_other_arithmetic(three_axes):
    mesh = three_axes
    assert (str(mesh), mesh.devices, mesh.data, mesh.model) == ("2x3x4", 24, 3, 4)
    assert mesh.coordinates(23) == {STAGE: 1, DATA: 2, MODEL: 3}
    assert [mesh.device(mesh.coordinates(device)) for device in range(24)] == list(range(24))
    assert MeshShape.parse("1x8") == MeshShape(data=1, model=8) == {STAGE: 1, DATA: 1, MODEL: 8}
    assert MeshShape.parse("2x3x4") == MeshShape.parse((2, 3, 4)) == mesh
    assert mesh.groups(STAGE)[0] == [0, 12]
    assert mesh.groups(STAGE, MODEL)[0] == [0, 1, 2, 3, 12, 13, 14, 15]
    assert list(mesh.first_holders((STAGE, None, MODEL))) == [0, 1, 2, 3, 12, 13, 14, 15]


def test_a_third_axis_is_planned_drawn_and_saved(three_axes):
    mesh = three_axes
    plan = make_plan(TINY, mesh, {"model.layers.*.mlp.up_proj.weight": [MODEL, STAGE]})
    placement = plan["model.layers.0.mlp.up_proj.weight"]
    assert placement.local_shape(mesh) == (10, 12)
    assert Plan.from_json(plan.to_json()) == plan
    panel = planned(placement, mesh, title="up")
    assert [part.devices for part in panel.parts][:2] == [(0, 4, 8), (12, 16, 20)]
    assert device_rows(mesh)[-1] == [20, 21, 22, 23]
    assert directions(mesh) == "stage x data down, model across"
    assert len({colour([device], mesh) for device in range(24)}) == 24
    assert len(draw("m", mesh, [panel]).boxes) == 24 + 8
    entry = TensorEntry(dtype="float32", shape=[24, 8], axes=[STAGE, MODEL], blocks=None)
    manifest = Manifest(
        **{key: {} for key in ("schedule", "settings", "plan", "versions", "files")},
        **{"step": 0, "tokens": 0, "mesh": mesh, "tensors": {"t": entry}},
        data={"epoch": 0, "row": 0, "fingerprint": ""},
        rng={"seed": 0, "step": 0},
    )
    assert entry.fits(mesh)
    assert json.loads(manifest.model_dump_json())["mesh"] == {STAGE: 2, DATA: 3, MODEL: 4}
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again == manifest and type(again.mesh) is MeshShape


def test_a_collective_along_a_third_axis_has_its_name(three_axes):
    from parallama.prove.compiled_collectives import axis_of  # imports torch

    mesh = three_axes
    assert [axis_of(mesh.groups(*axes), mesh) for axes in ((STAGE,), (DATA, STAGE), AXES)] == [
        "stage",
        "stage+data",
        "data+model",
    ]
