"""The mesh shape reads every documented form, and says what is wrong with any other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised

from parallama.errors import UsageError
from parallama.plan.mesh_shape import AXES, DATA, MODEL, MeshShape, axis_name

SIZES = st.integers(min_value=1, max_value=999_999)
NAMES = ("'data'", "'batch'", "'model'")


@pytest.mark.parametrize(
    ("text", "data", "model"),
    [
        ("1x8", 1, 8),
        ("2X4", 2, 4),
        ("2,4", 2, 4),
        (" 2 x 4 ", 2, 4),
        ("2 ,4\n", 2, 4),
        ("8", 1, 8),
        ("data=2,model=4", 2, 4),
        ("model=4,data=2", 2, 4),
        ("model=4 , data=2", 2, 4),
        ("model=8", 1, 8),
        ("data=8", 8, 1),
        ("batch=2,model=4", 2, 4),
        ("dp=2,tp=4", 2, 4),
        ("999999x1", 999_999, 1),
        ((2, 4), 2, 4),
        (8, 1, 8),
        (MeshShape(data=2, model=4), 2, 4),
    ],
)
def test_every_documented_form_is_read(text, data, model):
    shape = MeshShape.parse(text)
    assert shape == MeshShape(data=data, model=model)
    assert (shape.data, shape.model, shape.devices) == (data, model, data * model)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        *(
            (text, (f"mesh '{text}'", "1x8", "data=2,model=4"))
            for text in (
                *("", "eight", "1x", "1x2x4", "-1x8", "1.5x8", "1000000x1", "data=2;model=4"),
                *("data=two", "data=2,", (2,), True, None, 2.0),
            )
        ),
        ("9" * 5000 + "x1", (f"mesh '{'9' * 79}...",)),
        *(
            (text, (f"'{axis}'", size, "at least 1"))
            for text, axis, size in (
                ("0x8", "data", "0"),
                ("8x0", "model", "0"),
                ("0", "model", "0"),
                (-8, "model", "-8"),
                ("data=0", "data", "0"),
                ((2, True), "model", "True"),
                (("2", 4), "data", "'2'"),
                ((2, 4.0), "model", "4.0"),
            )
        ),
        ("rows=2,model=4", ("'rows'", *NAMES)),
        ("Data=2", ("'Data'", *NAMES)),
        ("model=2,model=4", ("'model=2,model=4'", "'model'", "twice")),
        ("batch=2,data=2", ("'batch=2,data=2'", "'data'", "twice")),
        ("tp=2,model=2", ("'tp=2,model=2'", "'model'", "twice")),
    ],
)
def test_every_other_form_is_an_error_that_names_it(text, parts):
    with pytest.raises(UsageError) as caught:
        MeshShape.parse(text)
    check_raised(caught.value, 2, *parts)


@settings(deadline=None)
@given(data=SIZES, model=SIZES)
def test_a_shape_reads_its_own_text_back(data, model):
    shape = MeshShape(data=data, model=model)
    assert str(shape) == f"{data}x{model}"
    assert MeshShape.parse(str(shape)) == shape
    assert MeshShape.parse(f"data={data},model={model}") == shape
    assert MeshShape.parse((data, model)) == shape


@settings(deadline=None)
@given(data=st.integers(1, 12), model=st.integers(1, 12))
def test_every_device_has_its_own_coordinates_row_by_row(data, model):
    shape = MeshShape(data=data, model=model)
    places = [shape.coordinates(device) for device in range(shape.devices)]
    assert places == [{DATA: row, MODEL: column} for row in range(data) for column in range(model)]


def test_an_unsplit_dim_has_one_part():
    shape = MeshShape(data=2, model=4)
    assert (shape.size(DATA), shape.size(MODEL), shape.size(None)) == (2, 4, 1)


@pytest.mark.parametrize(
    ("name", "axis"),
    [("data", DATA), ("batch", DATA), ("dp", DATA), ("model", MODEL), ("tp", MODEL)],
    ids=lambda value: str(value),
)
def test_batch_is_an_alias_of_data(name, axis):
    assert axis_name(name) == axis
    assert axis in AXES


@pytest.mark.parametrize("name", ["", "rows", "DATA", "model "])
def test_no_other_axis_has_a_name(name):
    with pytest.raises(UsageError) as caught:
        axis_name(name)
    check_raised(caught.value, 2, repr(name), *NAMES)
