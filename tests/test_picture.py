"""Pictures show who holds what, for any rank and order of axes, the same in both file formats."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
from forks import Done
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised, check_refusal
from test_plan import MESHES, TINY

from parallama.errors import UsageError
from parallama.plan import picture
from parallama.plan.layer_patterns import layer_patterns
from parallama.plan.make_plan import make_plan
from parallama.plan.mesh_shape import DATA, MODEL, MeshShape
from parallama.plan.picture import Panel, Part, colour, devices_text, draw, parts, planned
from parallama.plan.picture_files import svg, write

AXES = [
    tuple(axes)
    for rank in range(5)
    for axes in sorted({p[:rank] for p in permutations([DATA, MODEL, *[None] * rank])}, key=str)
]
ON_2X4 = MeshShape(data=2, model=4)


def drawn(axes, mesh) -> picture.Drawing:
    shape = tuple(8 for _ in axes)
    return draw(
        "a model", mesh, [Panel(title="a tensor", note="", shape=shape, parts=parts(axes, mesh))]
    )


@settings(deadline=None)
@given(axes=st.sampled_from(AXES), mesh=MESHES)
def test_the_parts_cover_the_tensor_and_every_device_holds_one(axes, mesh):
    found = parts(axes, mesh)
    assert sorted(device for part in found for device in part.devices) == list(range(mesh.devices))
    covered = Fraction(0)
    for part in found:
        volume = Fraction(1)
        for first, last in part.spans:
            volume *= last - first
        covered += volume
    assert covered == 1
    assert len({part.spans for part in found}) == len(found)


@settings(deadline=None)
@given(axes=st.sampled_from(AXES), mesh=MESHES)
def test_every_part_is_drawn_where_it_lies_with_its_devices(axes, mesh):
    drawing = drawn(axes, mesh)
    boxes, labels = (
        drawing.boxes[mesh.devices :],
        [label.text for label in drawing.labels if label.centred][mesh.devices :],
    )
    found = parts(axes, mesh)
    assert labels == [devices_text(part.devices) for part in found]
    left, right = min(box.x for box in boxes), max(box.x + box.width for box in boxes)
    top, bottom = min(box.y for box in boxes), max(box.y + box.height for box in boxes)
    assert sum(box.width * box.height for box in boxes) == pytest.approx(
        (right - left) * (bottom - top)
    )
    assert right < drawing.width and bottom < drawing.height
    for part, box in zip(found, boxes, strict=True):
        split = [dim for dim, axis in enumerate(axes) if mesh.size(axis) > 1]
        areas = 1.0
        for dim in split:
            areas *= float(part.spans[dim][1] - part.spans[dim][0])
        assert box.width * box.height == pytest.approx(areas * (right - left) * (bottom - top))


def placed(axes) -> dict[str, tuple[float, float]]:
    """Where on a 2x4 mesh each device's part of a `[8, 8]` weight begins, in shares of a side."""
    drawing = drawn(axes, ON_2X4)
    pairs = list(
        zip(drawing.boxes, [label for label in drawing.labels if label.centred], strict=True)
    )[8:]
    left, top = min(box.x for box, _ in pairs), min(box.y for box, _ in pairs)
    width = max(box.x + box.width for box, _ in pairs) - left
    height = max(box.y + box.height for box, _ in pairs) - top
    return {
        label.text: (round((box.x - left) / width, 6), round((box.y - top) / height, 6))
        for box, label in pairs
    }


def test_a_plan_of_any_axis_order_is_drawn_as_it_lies():
    assert placed((MODEL, None)) == {
        "0,4": (0, 0),
        "1,5": (0, 0.25),
        "2,6": (0, 0.5),
        "3,7": (0, 0.75),
    }
    assert placed((None, MODEL)) == {
        "0,4": (0, 0),
        "1,5": (0.25, 0),
        "2,6": (0.5, 0),
        "3,7": (0.75, 0),
    }
    assert placed((None, DATA)) == {"0-3": (0, 0), "4-7": (0.5, 0)}
    assert placed((DATA, MODEL)) == {
        str(device): (device % 4 / 4, device // 4 / 2) for device in range(8)
    }
    assert placed((MODEL, DATA)) == {
        str(device): (device // 4 / 2, device % 4 / 4) for device in range(8)
    }
    assert placed((None, None)) == {"0-7": (0, 0)}


def test_only_split_dims_of_a_high_rank_are_drawn():
    assert placed((DATA, None, None, MODEL)) == placed((DATA, MODEL))
    assert placed((None, MODEL, None, None)) == placed((None, MODEL))


def test_a_measured_part_is_drawn_like_a_planned_one():
    halves = [(Fraction(0), Fraction(1, 2)), (Fraction(1, 2), Fraction(1))]
    measured = Panel(
        title="t",
        note="",
        shape=(8,),
        parts=tuple(Part(devices=(device,), spans=(halves[device],)) for device in (0, 1)),
    )
    mesh = MeshShape(model=2)
    by_plan = Panel(title="t", note="", shape=(8,), parts=parts((MODEL,), mesh))
    assert draw("m", mesh, [measured]) == draw("m", mesh, [by_plan])


@settings(deadline=None)
@given(mesh=st.builds(MeshShape, data=st.integers(1, 4), model=st.integers(1, 9)))
def test_devices_have_colours_of_their_own_and_what_all_hold_is_grey(mesh):
    assert len({colour([device], mesh) for device in range(mesh.devices)}) == mesh.devices
    shade = colour(range(mesh.devices), mesh)
    assert shade[1:3] == shade[3:5] == shade[5:7]


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        ([3], "3"),
        ([0, 1], "0-1"),
        ([0, 4], "0,4"),
        ([0, 8, 16], "0,8,16"),
        ([0, 8, 16, 24], "0,8..24"),
        ([0, 1, 4, 5], "0,1,4,5"),
        ([0, 1, 2, 4, 5, 6, 8], "0,1,2,4,5,6... (7)"),
    ],
)
def test_devices_are_named_shortly(devices, text):
    assert devices_text(devices) == text


def whole_plan(mesh: MeshShape) -> picture.Drawing:
    plan = make_plan(replace(TINY, qkv_bias=True), mesh)
    return draw(
        "a <model> & more",
        mesh,
        [planned(each.placement, mesh, title=each.title) for each in layer_patterns(plan)],
    )


def test_svg_has_every_box_and_label(tmp_path: Path):
    drawing = whole_plan(ON_2X4)
    write(drawing, tmp_path / "p.svg")
    root = ElementTree.fromstring((tmp_path / "p.svg").read_text())
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}rect")) == len(drawing.boxes) + 1  # and the paper
    assert [node.text for node in root.findall(f"{space}text")] == [
        label.text for label in drawing.labels
    ]
    assert "a <model> & more" in {label.text for label in drawing.labels}


def test_png_is_the_same_drawing(tmp_path: Path):
    import matplotlib.image

    drawing = whole_plan(ON_2X4)
    write(drawing, tmp_path / "p.png")
    pixels = matplotlib.image.imread(tmp_path / "p.png")
    assert pixels.shape[:2] == pytest.approx((2 * drawing.height, 2 * drawing.width), abs=2)
    for box in drawing.boxes:
        x, y = box.x + 3, box.y + 3  # inside, away from the text
        red, green, blue = (
            round(255 * float(part)) for part in pixels[round(2 * y), round(2 * x), :3]
        )
        assert f"#{red:02x}{green:02x}{blue:02x}" == box.fill
    assert svg(drawing) == svg(whole_plan(ON_2X4))


def test_panels_do_not_overlap():
    drawing = whole_plan(MeshShape(data=4, model=9))
    boxes = drawing.boxes
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            apart = (
                one.x + one.width <= other.x + 1e-6
                or other.x + other.width <= one.x + 1e-6
                or one.y + one.height <= other.y + 1e-6
                or other.y + other.height <= one.y + 1e-6
            )
            assert apart


@pytest.mark.parametrize(
    ("name", "parts"),
    [("p.jpg", (".svg", ".png")), ("none/p.svg", ("folder",)), ("folder.svg", ("folder",))],
)
def test_a_file_that_cannot_be_written_is_an_error_that_names_it(
    tmp_path: Path, name: str, parts: tuple[str, ...]
):
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(UsageError) as caught:
        write(whole_plan(ON_2X4), tmp_path / name)
    check_raised(caught.value, 2, f"--plot {tmp_path / name}", *parts)


def test_a_png_without_matplotlib_names_the_extra(tmp_path: Path):
    code = f"""
import sys
from importlib.machinery import PathFinder
class Without:
    def find_spec(self, name, path=None, target=None):
        return None if name == "matplotlib" else PathFinder.find_spec(name, path, target)
sys.meta_path = [finder for finder in sys.meta_path if finder is not PathFinder] + [Without()]
from parallama.__main__ import run
sys.exit(run(["plan", "smollm2", "--plot", {str(tmp_path / "p.png")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    check_refusal(
        Done(done.returncode, done.stdout, done.stderr),
        2,
        *("--plot", "matplotlib", "pip install 'parallama[bench]'", ".svg"),
    )
