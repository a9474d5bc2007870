"""Cutting a tensor into device parts and putting them together loses nothing, on any mesh.

Torch on the CPU, no XLA.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallama.model.families import TP_PLANS
from parallama.model.spec import ModelSpec
from parallama.plan.heads import EMPTY
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import DATA, MODEL, MeshShape
from parallama.plan.placement import Placement, Plan
from parallama.sharded.layout import device_part, take_off, take_off_gradient

# Splits some weights over both axes; `hidden` below is a multiple of every `data` size.
TWO_D = {
    "model.layers.*.self_attn.q_proj.weight": ["model", "data"],
    "model.layers.*.self_attn.o_proj.weight": ["data", "model"],
    "model.layers.*.mlp.up_proj.weight": ["model", "data"],
    "model.layers.*.mlp.down_proj.weight": ["data", "model"],
    "model.embed_tokens.weight": ["model", "data"],
    "model.norm.weight": ["data"],
}
REPLICATED = {
    "model.layers.*.self_attn.*.weight": "replicate",
    "model.layers.*.mlp.up_proj.weight": "rowwise",
}


@st.composite
def plans(draw, overrides=(None, TWO_D, REPLICATED), head_dims=(2, 3, 4, 5, 6)):
    mesh = MeshShape(data=draw(st.integers(1, 3)), model=draw(st.integers(1, 9)))
    asked = draw(st.sampled_from(overrides))
    kv = draw(st.integers(1, 6))
    # `rowwise` on up_proj splits `hidden` over model.
    unit = 6 * mesh.model if asked is REPLICATED else 6
    bias = draw(st.booleans())
    spec = ModelSpec(
        model_type="llama",
        hidden=unit * draw(st.integers(1, 2)),
        layers=1,
        query_heads=kv * draw(st.integers(1, 6)),
        kv_heads=kv,
        head_dim=draw(st.sampled_from(head_dims)),
        intermediate=draw(st.integers(1, 30)),
        vocab=draw(st.integers(1, 40)),
        max_positions=16,
        tied=draw(st.booleans()),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tp_plan=TP_PLANS["llama"],
    )
    return make_plan(spec, mesh, asked)


def checkpoint_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every element another value (in float32), none of them zero."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float32).reshape(shape).to(dtype)


def assemble(parts: list[torch.Tensor], plan: Plan, placement: Placement) -> torch.Tensor:
    """Put each device's part where its coordinates say; parts of the same stretch must be equal."""
    whole = torch.full(placement.shape, torch.nan, dtype=parts[0].dtype)
    for device, part in enumerate(parts):
        coordinates = plan.mesh.coordinates(device)
        spot = tuple(
            slice(0, size)
            if axis is None
            else slice(coordinates[axis] * size, (coordinates[axis] + 1) * size)
            for size, axis in zip(part.shape, placement.axes, strict=True)
        )
        held = whole[spot]
        assert held.shape == part.shape
        assert held.isnan().all() or torch.equal(held, part)
        whole[spot] = part
    assert not whole.isnan().any()
    return whole


def assert_round_trip(plan: Plan, dtype: torch.dtype) -> None:
    for placement in plan.parameters:
        source = checkpoint_tensor(placement.source_shape, dtype)
        parts = [
            device_part(source, plan, placement, device) for device in range(plan.mesh.devices)
        ]
        assert {tuple(part.shape) for part in parts} == {placement.local_shape(plan.mesh)}
        assert {part.dtype for part in parts} == {dtype}
        back = take_off(assemble(parts, plan, placement), plan, placement.name)
        assert back.dtype == dtype
        assert torch.equal(back, source), placement.name


@settings(deadline=None)
@given(plan=plans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_parameter_comes_back_bit_equal_from_the_devices_parts(plan, dtype):
    assert_round_trip(plan, dtype)


@settings(deadline=None, derandomize=True)
@given(plan=plans(overrides=(None,), head_dims=(1,)))
def test_heads_of_one_element_come_back_too(plan):
    assert_round_trip(plan, torch.float32)


@settings(deadline=None)
@given(plan=plans(), seed=st.integers(0, 1000))
def test_taking_gradients_off_is_the_adjoint_of_laying_out(plan, seed):
    """`<laid_out(w), g> = <w, taken_off(g)>` for every `w` and `g`.

    Copies' gradients are added, those of padding dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    for placement in plan.parameters:
        source = torch.randint(-9, 10, placement.source_shape, generator=generator)
        gradient = torch.randint(-9, 10, placement.shape, generator=generator)
        parts = [
            device_part(source, plan, placement, device).float()
            for device in range(plan.mesh.devices)
        ]
        laid_out = assemble(parts, plan, placement).long()
        back = take_off_gradient(gradient, plan, placement.name)
        assert back.shape == source.shape
        assert (laid_out * gradient).sum() == (source * back).sum(), placement.name


@settings(deadline=None)
@given(plan=plans(overrides=(None,)))
def test_each_device_holds_its_slots_heads_and_zeros_elsewhere(plan):
    name = "model.layers.0.self_attn.q_proj.weight"
    placement, head_dim, layout = plan[name], plan.model.head_dim, plan.head_layout
    source = checkpoint_tensor(placement.source_shape, torch.float32)
    own = len(layout.query_sources) // plan.mesh.model
    for device in range(plan.mesh.devices):
        first = plan.mesh.coordinates(device)[MODEL] * own
        expected = [
            torch.zeros(head_dim, plan.model.hidden)
            if head == EMPTY
            else source[head * head_dim : (head + 1) * head_dim]
            for head in layout.query_sources[first : first + own]
        ]
        assert torch.equal(device_part(source, plan, placement, device), torch.cat(expected))


@settings(deadline=None)
@given(plan=plans(overrides=(None,)))
def test_what_is_added_to_a_parameter_is_zero(plan):
    for placement in plan.parameters:
        blocks = plan.blocks(placement.name)
        if blocks is None:
            continue
        source = checkpoint_tensor(placement.source_shape, torch.float32)
        whole = assemble(
            [device_part(source, plan, placement, device) for device in range(plan.mesh.devices)],
            plan,
            placement,
        )
        pieces = whole.split(blocks.block, dim=blocks.dim)
        assert len(pieces) == len(blocks.sources)
        for piece, origin in zip(pieces, blocks.sources, strict=True):
            assert (piece == 0).all() if origin == EMPTY else (piece != 0).all()


def test_a_weight_split_over_both_axes_is_cut_in_rows_and_columns():
    spec = ModelSpec(
        model_type="llama",
        hidden=4,
        layers=1,
        query_heads=2,
        kv_heads=2,
        head_dim=2,
        intermediate=3,
        vocab=4,
        max_positions=16,
        tied=True,
        tp_plan=TP_PLANS["llama"],
    )
    plan = make_plan(spec, MeshShape(data=2, model=2), TWO_D)
    placement = plan["model.layers.0.mlp.up_proj.weight"]
    assert (placement.shape, placement.axes) == ((4, 4), (MODEL, DATA))
    source = checkpoint_tensor((3, 4), torch.float32)
    parts = [device_part(source, plan, placement, device).tolist() for device in range(4)]
    # Device i is at data i // 2, model i % 2; the fourth row is padding.
    assert parts == [[[1, 2], [5, 6]], [[9, 10], [0, 0]], [[3, 4], [7, 8]], [[11, 12], [0, 0]]]


def test_a_part_that_needs_no_laying_out_is_a_view():
    spec = ModelSpec(
        model_type="llama",
        hidden=4,
        layers=1,
        query_heads=4,
        kv_heads=4,
        head_dim=2,
        intermediate=8,
        vocab=8,
        max_positions=16,
        tied=True,
        tp_plan=TP_PLANS["llama"],
    )
    plan = make_plan(spec, MeshShape(model=4))
    for placement in plan.parameters:
        source = checkpoint_tensor(placement.source_shape, torch.float32)
        for device in range(4):
            assert (
                device_part(source, plan, placement, device).untyped_storage().data_ptr()
                == source.untyped_storage().data_ptr()
            )
