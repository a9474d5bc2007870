"""What is read from optimized HLO, which is text that XLA wrote."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallama.prove import hlo

TEXT = """HloModule SyncTensorsGraph.9, is_scheduled=true, \
input_output_alias={ {1}: (2, {}, must-alias), {2}: (0, {}, may-alias) }, \
entry_computation_layout={(f32[2,8]{1,0})->f32[2,8]{1,0}}, num_partitions=2

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

ENTRY %main.7_spmd (p0: bf16[2,8], p1: s64[3], p2: f32[4]) -> (f32[2,8], bf16[2,8], f32[4]) {
  %p0 = bf16[2,8]{1,0} parameter(0), sharding={devices=[1,2]<=[2]}
  %p1 = s64[3]{0} parameter(1)
  %p2 = f32[4]{0} parameter(2), metadata={op_name="xla__device_data"}
  %dot.2 = f32[2,8]{1,0} dot(%p0, %p0), lhs_contracting_dims={1}, \
rhs_contracting_dims={1}, metadata={op_type="aten__einsum" \
op_name="model.1/model.layers.0.2/model.layers.0.self_attn.12/aten__einsum.4/aten__mul"}
  %all-reduce-start = f32[2,8]{1,0} all-reduce-start(%dot.2), channel_id=1, \
replica_groups={{0,1}}, to_apply=%add, \
metadata={op_name="model.layers.0.mlp.down_proj.5/aten__einsum"}
  %all-reduce-done = f32[2,8]{1,0} all-reduce-done(%all-reduce-start)
  %all-gather = (f32[4]{0}, pred[16]{0}) all-gather(%p2, %p2), \
channel_id=2, replica_groups=[1,2]<=[2], dimensions={0}
  %copy.3 = f32[4]{0} copy(%p2)
  %bitcast = f32[4]{0} bitcast(%all-gather)
  %dot.3 = f32[4]{0} dot(%bitcast, %copy.3), metadata={op_name="lm_head.3/aten__einsum"}
  ROOT %tuple = (f32[2,8]{1,0}, bf16[2,8]{1,0}, f32[4]{0}) tuple(%all-reduce-done, %p0, %copy.3)
}
"""
MODULE = hlo.parse(TEXT)


def test_outputs_that_take_over_a_parameters_buffer_are_known() -> None:
    assert MODULE.aliases == {1: 2, 2: 0}
    assert hlo.parse("HloModule m, is_scheduled=true\n").aliases == {}
    assert hlo.parse("HloModule m, input_output_alias={ {}: (3, {}, must-alias) }\n").aliases == {
        0: 3
    }


def test_parameters_are_those_of_the_entry_computation() -> None:
    assert {number: each.results[0].shape for number, each in MODULE.parameters.items()} == {
        0: (2, 8),
        1: (3,),
        2: (4,),
    }


def test_a_collective_has_its_bytes_and_its_module_and_an_asynchronous_one_counts_once() -> None:
    assert [(each.opcode, each.bytes, each.scope) for each in MODULE.collectives] == [
        ("all-reduce", 64, "model.layers.0.mlp.down_proj"),
        ("all-gather", 4 * 4 + 16, ""),
    ]


def test_a_module_is_the_innermost_scope_that_is_no_operation() -> None:
    assert (
        next(each for each in MODULE.instructions if each.name == "dot.2").scope
        == "model.layers.0.self_attn"
    )


def test_the_product_that_reads_a_result_is_found_through_what_lies_between() -> None:
    gather = MODULE.collectives[1]
    reader = MODULE.next_of(gather, "dot")
    assert reader is not None and (reader.name, reader.scope) == ("dot.3", "lm_head")
    assert MODULE.next_of(reader, "dot") is None


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("pred", 2),
        ("s4", 1),
        ("bf16", 4),
        ("f32", 8),
        ("s64", 16),
        ("u8", 2),
        ("f8e4m3fn", 2),
        ("c64", 16),
    ],
)
def test_arrays_have_their_bytes(dtype: str, size: int) -> None:
    assert hlo.Array(dtype=dtype, shape=(2,)).bytes == size


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", ((0, 1), (2, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("to_apply=%add", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0},{2,3}}", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,1},{2,3},{1,2}}", ((0, 1, 2, 3),)),
    ],
)
def test_groups_of_devices_are_read_in_every_form(text: str, groups: object) -> None:
    assert hlo.replica_groups(text, 4) == groups


@given(rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_the_short_form_of_rows_and_columns_is_the_long_one(rows: int, columns: int) -> None:
    grid = [[row * columns + column for column in range(columns)] for row in range(rows)]
    devices = rows * columns
    assert hlo.replica_groups(f"replica_groups=[{rows},{columns}]<=[{devices}]", devices) == tuple(
        map(tuple, grid)
    )
    transposed = hlo.replica_groups(
        f"replica_groups=[{columns},{rows}]<=[{rows},{columns}]T(1,0)", devices
    )
    assert transposed == tuple(zip(*grid, strict=True))
    assert sorted(itertools.chain(*transposed)) == list(range(devices))


def test_text_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="does not begin with HloModule"):
        hlo.parse("ENTRY %main")
