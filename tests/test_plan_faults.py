"""What a user's data can break is refused with its name and value, also under `python -O`."""

import ast
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from test_plan import ON_2X2, TINY

import parallama
from parallama.errors import CheckpointError, PlanError, UsageError
from parallama.model.known_configs import CONFIGS, spec_of
from parallama.plan.cost import shown_bytes
from parallama.plan.heads import choose
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import MeshShape
from parallama.plan.overrides import read_overrides
from parallama.plan.picture import Panel, Part, draw
from parallama.plan.placement import Plan
from parallama.train.manifest import read_manifest

SOURCE = Path(parallama.__file__).parent
TOO_LONG = 1 << 20_000  # Python writes no whole number of more than 4300 digits


@pytest.mark.parametrize("room", ["model", "plan"])
def test_no_guard_is_an_assert(room):
    found = [
        f"{path.name}:{node.lineno}"
        for path in (SOURCE / room).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_a_tensor_that_is_split_along_three_dims_is_no_picture():
    whole, half = (Fraction(0), Fraction(1)), (Fraction(0), Fraction(1, 2))
    part = Part(devices=(0,), spans=(half, whole, half, half))
    panel = Panel(title="a tensor", note="", shape=(2, 2, 2, 2), parts=(part,))
    with pytest.raises(UsageError) as caught:
        draw("a model", MeshShape(model=2), [panel])
    assert "a tensor" in str(caught.value) and "[0, 2, 3]" in str(caught.value)


# -- configs


def refused_config(**changed) -> str:
    with pytest.raises(CheckpointError) as caught:
        spec_of({**CONFIGS["smollm2-135m"], **changed}, "the config")
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("rope_theta", {"rope_theta": 10**400}),
        ("factor", {"rope_scaling": {"rope_type": "linear", "factor": 10**400}}),
        (
            "long_factor",
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 32,
                    "long_factor": [10**400] * 32,
                    "original_max_position_embeddings": 4096,
                }
            },
        ),
    ],
)
def test_a_rotary_number_beyond_every_float_is_refused_by_name(name, changed):
    assert name in refused_config(**changed)


@pytest.mark.parametrize(
    "name",
    [
        *("rope_theta", "rms_norm_eps", "hidden_size", "pad_token_id", "eos_token_id", "dtype"),
        *("hidden_act", "num_experts", "model_type", "tie_word_embeddings", "layer_types"),
    ],
)
def test_a_number_too_long_to_write_down_is_refused_by_name(name):
    assert name in refused_config(**{name: TOO_LONG})


def test_heads_that_have_very_many_layouts_are_laid_out():
    layout = choose(65_536, 1, 6)
    assert (layout.kind, layout.slots % 6) == ("repeat+pad", 0)
    assert sorted(set(layout.query_sources)) == [-1, *range(65_536)]


# -- plans


@pytest.mark.parametrize(
    "style",
    ["colwise_gather_output", "colwise_rep", "embedding_rowwise", "vocab"],
)
def test_every_known_style_of_a_models_own_plan_is_placed_with_a_reason(style):
    spec = replace(TINY, tp_plan={**TINY.tp_plan, "layers.*.mlp.up_proj": style})
    placement = make_plan(spec, ON_2X2)["model.layers.0.mlp.up_proj.weight"]
    assert (placement.style, placement.axes) == ("vocab", ("model", None))
    assert placement.reason


@pytest.mark.parametrize(
    "content",
    [
        f"a.b: {hex(TOO_LONG)}",
        "a.b: [&a [x, x, x, x, x, x, x, x, x], "
        + ", ".join(
            f"&{after} [{', '.join([f'*{before}'] * 9)}]"
            for before, after in zip("abcdefghijk", "bcdefghijkl", strict=True)
        )
        + "]",
    ],
    ids=["a number too long to write down", "a list of lists that few lines make huge"],
)
def test_a_plan_file_whose_value_cannot_be_shown_is_refused_briefly(tmp_path, content):
    (tmp_path / "plan.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(PlanError) as caught:
        read_overrides(tmp_path / "plan.yaml")
    assert "plan.yaml" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "7", "null", "{}", '{"placements": [7]}', "[" * 20_000),
        make_plan(TINY, ON_2X2).to_json().replace('"data": 2', '"data": 0'),
        make_plan(TINY, ON_2X2).to_json().replace('"kind"', '"sort"'),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_text_that_is_no_plan_is_an_error(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (9_999, "9,999 B"),
        (10_000, "10 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (999_600_000, "1 GB"),
        (8_030_000_000, "8.03 GB"),
        (999_600_000_000_000, "1,000 TB"),
        (1_500_000_000_000_000, "1,500 TB"),
    ],
)
def test_bytes_are_shown_in_a_unit_that_needs_no_exponent(count, text):
    assert shown_bytes(count) == text


# -- a training checkpoint's manifest


def manifest(folder: Path, mesh: object, **tensor: object) -> Path:
    """A checkpoint of one tensor, as far as its manifest is read."""
    entry = {"dtype": "float32", "shape": [4, 4], "axes": [None, None], "blocks": None} | tensor
    files = {f"device-{device}.safetensors": b"1234" for device in range(2)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    document = {
        **{"step": 1, "tokens": 1, "mesh": mesh, "tensors": {"a": entry}},
        **{"schedule": {}, "settings": {}, "plan": {}, "versions": {}},
        "data": {"epoch": 0, "row": 0, "fingerprint": ""},
        "rng": {"seed": 0, "step": 1},
        "files": {name: {"bytes": 4, "sha256": "0" * 64} for name in files},
    }
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


ON_2 = {"data": 1, "model": 2}


def test_a_manifest_whose_tensor_fits_its_mesh_is_read(tmp_path):
    runs = {"dim": 0, "block": 1, "runs": [[1, 2], [0, 1], [-1, 1]]}
    read = read_manifest(manifest(tmp_path, ON_2, axes=["model", None], blocks=runs))
    assert read.mesh == MeshShape(model=2)
    assert read.tensors["a"].blocks.blocks.sources == (1, 2, 0, -1)


@pytest.mark.parametrize(
    "tensor",
    [
        {"axes": ["model", "model"]},  # its parts leave half of the tensor open
        {"axes": ["rows", None]},
        {"axes": ["tp", None]},
        {"blocks": {"dim": 0, "block": 1, "runs": [[0, 2], [3, 2]]}},  # nothing holds block 2
        {"blocks": {"dim": 0, "block": 1, "runs": [[-1, 4]]}},
        {"blocks": {"dim": 0, "block": 1, "runs": [[0, 6], [0, -2]]}},
        {"blocks": {"dim": 0, "block": 1, "runs": [[-2, 1], [0, 3]]}},
        {"blocks": {"dim": 2, "block": 1, "runs": [[0, 4]]}},
        {"blocks": {"dim": 0, "block": 1, "runs": [[0, 1], [-1, 1 << 60]]}},
    ],
    ids=str,
)
def test_a_manifest_whose_parts_cannot_make_a_tensor_is_refused(tmp_path, tensor):
    with pytest.raises(CheckpointError) as caught:
        read_manifest(manifest(tmp_path, ON_2, **tensor))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "mesh",
    [
        *({}, {"data": 1}, {"data": 1, "model": 2, "stage": 1}, {"dp": 1, "model": 2}, [1, 2], 2),
        *({"data": 0, "model": 2}, {"data": True, "model": 2}, {"data": 1.0, "model": 2}),
        *({"data": "1", "model": 2}, {"data": 1 << 40, "model": 1 << 40}),
    ],
    ids=str,
)
def test_a_manifest_without_a_mesh_of_all_axes_is_refused(tmp_path, mesh):
    with pytest.raises(CheckpointError) as caught:
        read_manifest(manifest(tmp_path, mesh))
    assert str(tmp_path) in str(caught.value) and "mesh" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
