"""A plan places every tensor once, with a reason, or says what it lacks; it needs no torch."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised

from parallama.errors import PlanError, UsageError
from parallama.model.families import TP_PLANS
from parallama.model.spec import ModelSpec
from parallama.plan import heads
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import DATA, MODEL, MeshShape
from parallama.plan.overrides import matches, read_overrides
from parallama.plan.placement import Plan
from parallama.plan.styles import STYLES

TINY = ModelSpec(
    model_type="llama",
    hidden=24,
    layers=2,
    query_heads=6,
    kv_heads=2,
    head_dim=4,
    intermediate=40,
    vocab=50,
    max_positions=64,
    tied=False,
    tp_plan=TP_PLANS["llama"],
)
LLAMA_3_1_8B = ModelSpec(
    model_type="llama",
    hidden=4096,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128256,
    max_positions=131072,
    tied=False,
    tp_plan=TP_PLANS["llama"],
)
ON_2X2 = MeshShape(data=2, model=2)
STYLE_LIST = "colwise, rowwise, vocab, replicate"
Q = "model.layers.0.self_attn.q_proj.weight"


@st.composite
def specs(draw):
    model_type = draw(st.sampled_from(sorted(TP_PLANS)))
    kv = draw(st.integers(1, 6))
    llama = model_type == "llama"
    return ModelSpec(
        model_type=model_type,
        hidden=draw(st.integers(1, 40)),
        layers=draw(st.integers(1, 3)),
        query_heads=kv * draw(st.integers(1, 6)),
        kv_heads=kv,
        head_dim=draw(st.integers(2, 10)),
        intermediate=draw(st.integers(1, 60)),
        vocab=draw(st.integers(1, 200)),
        max_positions=draw(st.integers(1, 1000)),
        tied=draw(st.booleans()),
        qkv_bias=draw(st.booleans()) if llama else model_type == "qwen2",
        output_bias=draw(st.booleans()) if llama else False,
        mlp_bias=draw(st.booleans()) if llama else False,
        head_norms=model_type == "qwen3",
        tp_plan=TP_PLANS[model_type],
    )


MESHES = st.builds(MeshShape, data=st.integers(1, 4), model=st.integers(1, 9))


def check_refused(*parts, overrides=None, spec=TINY, mesh=ON_2X2, **kwargs) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(spec, mesh, overrides, **kwargs)
    check_raised(caught.value, 2, *parts)


# Every tensor has its place.


@settings(deadline=None)
@given(spec=specs(), mesh=MESHES)
def test_every_parameter_is_placed_once_in_the_models_order_with_a_reason(spec, mesh):
    plan = make_plan(spec, mesh)
    assert [(placement.name, placement.source_shape) for placement in plan.parameters] == list(
        spec.parameters()
    )
    for placement in plan.placements:
        assert placement.reason
        assert "\n" not in placement.reason
        assert len(placement.source_shape) == len(placement.shape) == len(placement.axes)
        assert plan[placement.name] is placement
        assert placement.name in plan


@settings(deadline=None)
@given(spec=specs(), mesh=MESHES)
def test_every_device_holds_an_equal_part_of_every_parameter(spec, mesh):
    for placement in make_plan(spec, mesh).parameters:
        local = placement.local_shape(mesh)
        assert (
            tuple(size * mesh.size(axis) for size, axis in zip(local, placement.axes, strict=True))
            == placement.shape
        )


@settings(deadline=None)
@given(spec=specs(), mesh=MESHES)
def test_only_heads_intermediate_and_vocabulary_grow(spec, mesh):
    plan = make_plan(spec, mesh)
    for placement in plan.parameters:
        blocks = plan.blocks(placement.name)
        for dim, (source, size) in enumerate(
            zip(placement.source_shape, placement.shape, strict=True)
        ):
            if blocks is None or blocks.dim != dim:
                assert size == source
            else:
                assert size == blocks.block * len(blocks.sources)
                assert set(range(source // blocks.block)) == set(blocks.sources) - {heads.EMPTY}
        if placement.shape != placement.source_shape:
            assert "padded" in placement.reason or "repeated" in placement.reason


def test_the_placements_of_a_layer_are_megatrons():
    plan = make_plan(
        replace(
            TINY,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            head_norms=True,
            tp_plan=TP_PLANS["qwen3"],
        ),
        ON_2X2,
    )
    columns, rows = ((MODEL, None), "colwise"), ((None, MODEL), "rowwise")
    expected = {f"self_attn.{name}_proj.weight": columns for name in "qkv"} | {
        f"mlp.{name}_proj.weight": columns for name in ("gate", "up")
    }
    expected |= {"self_attn.o_proj.weight": rows, "mlp.down_proj.weight": rows}
    expected |= {f"self_attn.{name}_proj.bias": ((MODEL,), "colwise") for name in "qkv"}
    expected |= {f"mlp.{name}_proj.bias": ((MODEL,), "colwise") for name in ("gate", "up")}
    expected |= {
        "self_attn.o_proj.bias": ((None,), "rowwise"),
        "mlp.down_proj.bias": ((None,), "rowwise"),
    }
    norms = ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
    expected |= {f"{name}.weight": ((None,), "replicate") for name in norms}
    prefix = "model.layers.1."
    found = {
        p.name.removeprefix(prefix): (p.axes, p.style)
        for p in plan.parameters
        if p.name.startswith(prefix)
    }
    assert found == expected
    others = {p.name: (p.axes, p.style) for p in plan.parameters if ".layers." not in p.name}
    assert others == {
        "model.embed_tokens.weight": ((MODEL, None), "vocab"),
        "model.norm.weight": ((None,), "replicate"),
        "lm_head.weight": ((MODEL, None), "vocab"),
    }


def test_the_tensors_of_a_run_are_placed_too():
    plan = make_plan(replace(TINY, query_heads=9, kv_heads=3), MeshShape(data=2, model=4))
    run = {
        p.name: (p.kind, p.source_shape, p.shape, p.axes)
        for p in plan.placements
        if p.kind != "parameter"
    }
    assert run == {
        "model.rotary_emb.inv_freq": ("buffer", (2,), (2,), (None,)),
        "cache.key": ("cache", ("B", 3, "T", 4), ("B", 4, "T", 4), (DATA, MODEL, None, None)),
        "cache.value": ("cache", ("B", 3, "T", 4), ("B", 4, "T", 4), (DATA, MODEL, None, None)),
        "input.ids": ("input", ("B", "S"), ("B", "S"), (DATA, None)),
        "input.positions": ("input", ("B",), ("B",), (DATA,)),
        "output.logits": ("output", ("B", 50), ("B", 52), (DATA, MODEL)),
    }


def test_a_bare_models_parameters_are_placed_by_their_own_names():
    bare = [
        (name.removeprefix("model."), shape)
        for name, shape in TINY.parameters()
        if name != "lm_head.weight"
    ]
    plan, whole = make_plan(TINY, ON_2X2, parameters=bare), make_plan(TINY, ON_2X2)
    assert [placement.name for placement in plan.parameters] == [name for name, _ in bare]
    for placement in plan.parameters:
        twin = whole[f"model.{placement.name}"]
        assert (placement.shape, placement.axes) == (twin.shape, twin.axes)
        assert plan.blocks(placement.name) == whole.blocks(twin.name)


# Strict both ways.


def test_a_parameter_that_no_rule_covers_is_an_error_that_names_it():
    extra = [*TINY.parameters(), ("model.layers.0.adapter.weight", (4, 4))]
    check_refused("model.layers.0.adapter.weight", "'replicate'", parameters=extra)


def test_many_uncovered_parameters_are_counted():
    extra = [*TINY.parameters(), *((f"model.extra.{index}", (4,)) for index in range(7))]
    check_refused(*(f"model.extra.{index}" for index in range(4)), "3 more", parameters=extra)


def test_an_uncovered_parameter_can_be_covered_by_a_pattern():
    extra = [*TINY.parameters(), ("model.layers.0.adapter.weight", (4, 4))]
    placement = make_plan(
        TINY, ON_2X2, {"model.layers.*.adapter.weight": "replicate"}, parameters=extra
    )["model.layers.0.adapter.weight"]
    assert placement.axes == (None, None)
    assert "'model.layers.*.adapter.weight'" in placement.reason


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.2.*.*.weight",
        "model.layer.*.mlp.up_proj.weight",
        "q_proj",
        "",
        "*",
        "model.*",
        "cache.key",
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_that_names_it(pattern):
    check_refused(repr(pattern), Q, overrides={pattern: "replicate"})


def test_a_rule_of_the_models_own_plan_that_matches_nothing_is_an_error():
    spec = replace(TINY, tp_plan=TP_PLANS["qwen3"])
    check_refused("'model.layers.*.self_attn.q_norm.*'", spec=spec)


def test_a_style_of_the_models_own_plan_that_we_do_not_know_is_an_error():
    spec = replace(TINY, tp_plan={**TP_PLANS["llama"], "layers.*.mlp.up_proj": "packed_colwise"})
    check_refused("'layers.*.mlp.up_proj'", "'packed_colwise'", STYLE_LIST, spec=spec)


def test_a_parameter_whose_shape_is_not_the_configs_is_an_error():
    wrong = [(name, (26, 24) if name == Q else shape) for name, shape in TINY.parameters()]
    check_refused(Q, "[26, 24]", "24 in dim 0", parameters=wrong)


# Overrides.


@pytest.mark.parametrize(
    ("style", "axes"),
    [
        ("colwise", (MODEL, None)),
        ("rowwise", (None, MODEL)),
        ("vocab", (MODEL, None)),
        ("replicate", (None, None)),
        ([None, None], (None, None)),
        (["model", "data"], (MODEL, DATA)),
        (["batch", "model"], (DATA, MODEL)),
        (("dp", None), (DATA, None)),
    ],
)
def test_an_override_by_style_or_by_axes_places_what_it_matches_and_nothing_else(style, axes):
    pattern = "model.layers.1.mlp.up_proj.weight"
    plan, default = make_plan(TINY, ON_2X2, {pattern: style}), make_plan(TINY, ON_2X2)
    assert plan[pattern].axes == axes
    assert plan[pattern].style == (style if isinstance(style, str) else "axes")
    assert repr(pattern) in plan[pattern].reason
    assert [p for p in plan.placements if p.name != pattern] == [
        p for p in default.placements if p.name != pattern
    ]


def test_of_two_overrides_the_later_wins():
    overrides = {
        "model.layers.*.mlp.up_proj.weight": "replicate",
        "model.layers.1.mlp.up_proj.weight": "colwise",
    }
    plan = make_plan(TINY, ON_2X2, overrides)
    assert [plan[f"model.layers.{i}.mlp.up_proj.weight"].style for i in range(2)] == [
        "replicate",
        "colwise",
    ]
    plan = make_plan(TINY, ON_2X2, dict(reversed(overrides.items())))
    assert [plan[f"model.layers.{i}.mlp.up_proj.weight"].style for i in range(2)] == [
        "replicate",
        "replicate",
    ]


@pytest.mark.parametrize(
    ("pattern", "name", "covers"),
    [
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.b.b.c", False),
        ("*", "a.b", False),
        ("*.*", "a.b", True),
        ("a.*", "a", False),
        ("a.?_proj.w", "a.q_proj.w", True),
        ("a?b", "a.b", False),
        ("a.*_proj.w", "a.up_proj.w", True),
        ("A.b", "a.b", False),
    ],
)
def test_a_star_does_not_reach_over_a_dot(pattern, name, covers):
    assert matches(pattern, name) is covers


@pytest.mark.parametrize(
    ("style", "parts"),
    [
        ("rows", ("'rows'", STYLE_LIST)),
        ("model", ("'model'", STYLE_LIST)),
        (["model"], ("2 dims", "['model']")),
        ([], ("2 dims", "[]")),
        ([None, None, "batch"], ("2 dims", "[None, None, 'data']")),
        (["model", "model"], ("['model', 'model']", "twice")),
        (["batch", "data"], ("['data', 'data']", "twice")),
    ],
)
def test_an_override_that_does_not_fit_its_parameter_is_an_error_that_names_both(style, parts):
    check_refused(Q, *parts, overrides={Q: style})


def test_an_axis_that_no_mesh_has_is_an_error():
    with pytest.raises(UsageError) as caught:
        make_plan(TINY, ON_2X2, {Q: ["rows", None]})
    check_raised(caught.value, 2, "'rows'", "'data'", "'model'")


def test_a_dim_that_its_axis_does_not_divide_is_an_error_that_names_all_three():
    for name, axes, mesh, parts in (
        ("model.norm.weight", ["model"], MeshShape(model=5), ("dim 0", "'model'")),
        (Q, ["model", "batch"], MeshShape(data=5, model=2), ("dim 1", "'data'")),
    ):
        check_refused(name, *parts, "24", "5 devices", overrides={name: axes}, mesh=mesh)


@pytest.mark.parametrize("style", [3, None, True, 0.5])
def test_an_override_that_is_neither_style_nor_axes_is_an_error(style):
    check_refused(Q, overrides={Q: style})


def test_a_bias_that_every_device_holds_is_not_called_split():
    placement = make_plan(replace(TINY, output_bias=True), ON_2X2)[
        "model.layers.0.self_attn.o_proj.bias"
    ]
    assert placement.axes == (None,)
    assert "split" not in placement.reason


# Ties.


@settings(deadline=None)
@given(spec=specs(), mesh=MESHES)
def test_a_tied_head_is_not_placed_twice(spec, mesh):
    plan = make_plan(replace(spec, tied=True), mesh)
    assert "lm_head.weight" not in plan
    assert plan["model.embed_tokens.weight"].reason.split("; ")[1].startswith("the head shares it")
    assert "lm_head.weight" in make_plan(replace(spec, tied=False), mesh)


def test_a_pattern_for_a_tied_head_is_told_what_it_is_tied_to():
    spec, overrides = replace(TINY, tied=True), {"lm_head.weight": "replicate"}
    check_refused("'lm_head.weight'", "model.embed_tokens.weight", spec=spec, overrides=overrides)


# Bytes.


def test_llama_3_1_8b_on_1x8_takes_the_bytes_worked_out_by_hand():
    # One layer: q and o are 4096 x 4096, k and v 1024 x 4096, gate, up and down 14336 x 4096.
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096  # 41 943 040
    mlp = 3 * 14336 * 4096  # 176 160 768
    embedding_and_head = 2 * 128256 * 4096  # 1 050 673 152
    split = 32 * (attention + mlp) + embedding_and_head
    norms = (2 * 32 + 1) * 4096  # 266 240, on every device
    assert split + norms == 8_030_261_248
    each = 2 * (split // 8 + norms)
    assert each == 2_008_031_232
    plan = make_plan(LLAMA_3_1_8B, MeshShape(data=1, model=8))
    assert plan.parameter_bytes(itemsize=2) == [each] * 8
    # Keys and values, layers, KV heads a device, rows, positions, numbers and bytes.
    assert (
        plan.cache_bytes(batch=2, length=1000, itemsize=2) == [2 * 32 * 1 * 2 * 1000 * 128 * 2] * 8
    )


@pytest.mark.parametrize("data", [1, 2])
def test_a_model_that_divides_takes_an_equal_share_plus_its_norms_on_every_device(data):
    spec = replace(TINY, query_heads=16, kv_heads=8, vocab=64)
    plan = make_plan(spec, MeshShape(data=data, model=8))
    total = sum(math.prod(shape) for _, shape in spec.parameters())
    norms = (2 * spec.layers + 1) * spec.hidden
    assert plan.parameter_bytes(itemsize=4) == [4 * ((total - norms) // 8 + norms)] * (8 * data)
    assert all(placement.shape == placement.source_shape for placement in plan.parameters)


def test_the_cache_is_split_over_rows_and_heads():
    plan = make_plan(replace(TINY, query_heads=9, kv_heads=3), MeshShape(data=2, model=4))
    assert plan.head_layout.slots == 4
    assert (
        plan.cache_bytes(batch=6, length=10, itemsize=4)
        == [2 * TINY.layers * 3 * 1 * 10 * TINY.head_dim * 4] * 8
    )


def test_cache_rows_that_do_not_divide_are_not_rounded_down():
    plan = make_plan(TINY, MeshShape(data=2))
    try:
        each = plan.cache_bytes(batch=3, length=1, itemsize=1)[0]
    except UsageError:
        return
    assert each >= plan.cache_bytes(batch=4, length=1, itemsize=1)[0]


def test_sizes_after_padding_are_the_next_multiples():
    plan = make_plan(TINY, MeshShape(model=3))
    assert (plan.intermediate, plan.vocab) == (42, 51)
    assert plan["output.logits"].shape == ("B", 51)


# JSON.


@settings(deadline=None)
@given(spec=specs(), mesh=MESHES)
def test_a_plan_survives_json_without_loss(spec, mesh):
    plan = make_plan(
        spec, mesh, {"model.norm.weight": [None], "model.layers.0.mlp.*.weight": "replicate"}
    )
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert [again.blocks(p.name) for p in again.parameters] == [
        plan.blocks(p.name) for p in plan.parameters
    ]
    assert all(
        type(p.shape) is type(p.axes) is type(p.source_shape) is tuple for p in again.placements
    )


def test_the_json_is_an_object_with_the_model_the_mesh_the_heads_and_every_placement():
    plan = make_plan(TINY, ON_2X2)
    document = json.loads(plan.to_json())
    assert list(document) == ["model", "mesh", "heads", "placements"]
    assert document["mesh"] == {"data": 2, "model": 2}
    assert [item["name"] for item in document["placements"]] == [
        placement.name for placement in plan.placements
    ]


# Plan files.

OVERRIDES = {
    Q: "replicate",
    "model.norm.weight": [None],
    "model.layers.*.mlp.up_proj.weight": ["batch", None],
}


def test_overrides_are_read_from_yaml(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        f"# every device holds it\n{Q}: replicate\nmodel.norm.weight: [null]\n"
        "model.layers.*.mlp.up_proj.weight:\n  - batch\n  - null\n",
        encoding="utf-8",
    )
    assert read_overrides(file) == OVERRIDES


def test_overrides_are_read_from_json_and_used(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(OVERRIDES, indent=2), encoding="utf-8")
    assert read_overrides(str(file)) == OVERRIDES
    plan = make_plan(TINY, ON_2X2, read_overrides(file))
    assert plan[Q].axes == (None, None)
    assert plan["model.layers.1.mlp.up_proj.weight"].axes == (DATA, None)


def check_refused_file(path, *parts) -> None:
    with pytest.raises(PlanError) as caught:
        read_overrides(path)
    check_raised(caught.value, 2, repr(str(path)), *parts)


def test_a_plan_file_that_is_not_there_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # long paths are cut
    check_refused_file("none.yaml", "No such file or directory")
    check_refused_file(tmp_path, "Is a directory")


@pytest.mark.parametrize(
    "content",
    [
        b"a: [model",
        b'{"a": ',
        b"a: b: c",
        b"a: \xff\xfe\xff",
        b"\x00",
        b"a: !!python/object/apply:os.system ['false']",
        b"{[a]: b}",
        b"a: 2020-13-45",
        b"a: " + b"[" * 20_000,
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_plan_file_that_is_no_yaml_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    check_refused_file(path, "YAML", "JSON")


@pytest.mark.parametrize(
    "content", ["", "# nothing\n", "[]", "- a: b", "replicate", "{}", "7", "null"]
)
def test_a_plan_file_without_a_mapping_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "plan.yaml"
    path.write_text(content, encoding="utf-8")
    check_refused_file(path, "mapping", "pattern: style")


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ("a.b: 7", "'a.b'", "7"),
        ("a.b:", "'a.b'", "None"),
        ("a.b: {model: 0}", "'a.b'", "{'model': 0}"),
        ("a.b: [model, 1]", "'a.b'", "['model', 1]"),
        ("a.b: [[model], null]", "'a.b'", "[['model'], None]"),
        ("7: replicate", "7", "'replicate'"),
        ("yes: replicate", "True", "'replicate'"),
    ],
)
def test_a_plan_file_with_another_value_is_an_error_that_shows_it(tmp_path, content, key, value):
    path = tmp_path / "plan.yaml"
    path.write_text(f"{Q}: replicate\n{content}\n", encoding="utf-8")
    check_refused_file(path, key, value, STYLE_LIST)


@pytest.mark.parametrize(
    "content", ["a.b: replicate\na.b: colwise\n", '{"a.b": "replicate", "a.b": "colwise"}']
)
def test_a_pattern_that_stands_twice_in_a_plan_file_is_an_error(tmp_path, content):
    path = tmp_path / "plan.yaml"
    path.write_text(content, encoding="utf-8")
    check_refused_file(path, "a.b")


def test_the_styles_in_messages_are_the_styles_there_are():
    assert ", ".join(STYLES) == STYLE_LIST


def test_planning_imports_no_torch():
    code = (
        "import sys, parallama.errors, parallama.model.spec\n"
        "import parallama.plan.placement, parallama.plan.forecast\n"
        "print({'torch', 'torch_xla', 'transformers', 'jax'} & set(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
