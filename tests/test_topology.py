"""The mesh shape reads every documented form, and says what is wrong with any other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallama.errors import UsageError
from parallama.plan.mesh_shape import AXES, DATA, MODEL, MeshShape, axis_name

SIZES = st.integers(min_value=1, max_value=999_999)
UNREADABLE = "expected data x model, as 1x8 or 2x4, or names, as data=2,model=4"
WHOLE = "expected a whole number of at least 1"
NAMES = "expected 'data' (alias 'batch') or 'model'"


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
    ("text", "message"),
    [
        ("", f"mesh '' cannot be read\n{UNREADABLE}"),
        ("eight", f"mesh 'eight' cannot be read\n{UNREADABLE}"),
        ("1x", f"mesh '1x' cannot be read\n{UNREADABLE}"),
        ("1x2x4", f"mesh '1x2x4' cannot be read\n{UNREADABLE}"),
        ("-1x8", f"mesh '-1x8' cannot be read\n{UNREADABLE}"),
        ("1.5x8", f"mesh '1.5x8' cannot be read\n{UNREADABLE}"),
        ("1000000x1", f"mesh '1000000x1' cannot be read\n{UNREADABLE}"),
        ("9" * 5000 + "x1", f"mesh '{'9' * 79}... cannot be read\n{UNREADABLE}"),
        ("data=2;model=4", f"mesh 'data=2;model=4' cannot be read\n{UNREADABLE}"),
        ("data=two", f"mesh 'data=two' cannot be read\n{UNREADABLE}"),
        ("data=2,", f"mesh 'data=2,' cannot be read\n{UNREADABLE}"),
        ((2,), f"mesh '(2,)' cannot be read\n{UNREADABLE}"),
        (True, f"mesh 'True' cannot be read\n{UNREADABLE}"),
        (None, f"mesh 'None' cannot be read\n{UNREADABLE}"),
        (2.0, f"mesh '2.0' cannot be read\n{UNREADABLE}"),
        ("0x8", f"mesh axis 'data' has size 0\n{WHOLE}"),
        ("8x0", f"mesh axis 'model' has size 0\n{WHOLE}"),
        ("0", f"mesh axis 'model' has size 0\n{WHOLE}"),
        (-8, f"mesh axis 'model' has size -8\n{WHOLE}"),
        ("data=0", f"mesh axis 'data' has size 0\n{WHOLE}"),
        ((2, True), f"mesh axis 'model' has size True\n{WHOLE}"),
        (("2", 4), f"mesh axis 'data' has size '2'\n{WHOLE}"),
        ((2, 4.0), f"mesh axis 'model' has size 4.0\n{WHOLE}"),
        ("rows=2,model=4", f"unknown mesh axis 'rows'\n{NAMES}"),
        ("Data=2", f"unknown mesh axis 'Data'\n{NAMES}"),
        ("model=2,model=4", "mesh 'model=2,model=4' names axis 'model' twice"),
        ("batch=2,data=2", "mesh 'batch=2,data=2' names axis 'data' twice"),
        ("tp=2,model=2", "mesh 'tp=2,model=2' names axis 'model' twice"),
    ],
)
def test_every_other_form_is_an_error_that_names_it(text, message):
    with pytest.raises(UsageError) as caught:
        MeshShape.parse(text)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


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
    assert str(caught.value) == f"unknown mesh axis {name!r}\n{NAMES}"
