"""Pictures of who holds what: the mesh, and tensors cut into the parts that lie on its devices. SVG by hand, PNG by matplotlib. Pure.

Three steps: a `Panel` says which devices hold which part of a tensor (`planned` makes one from a plan's placement; a measured one can be made from what a runtime
says), `draw` turns panels into boxes and labels, and `svg` and `write` turn those into files.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import UsageError, lines
from .mesh_shape import DATA, MODEL, MeshShape
from .placement import Axes, Placement

Span = tuple[Fraction, Fraction]
"""A stretch of a dim, as fractions of its size."""

_WHOLE: Span = (Fraction(0), Fraction(1))
_GAP, _CELL, _LINE, _LETTER = 16.0, 14.0, 13.0, 5.6
_NARROW, _WIDE, _HIGH = 26.0, 150.0, 84.0
_PAGE = 1000.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a tensor.

    Attributes:
        devices: all that hold it, ascending.
        spans: which part, a span a dim.
    """

    devices: tuple[int, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One tensor, whole, and its parts.

    Attributes:
        title: first line above it.
        note: second line.
        shape: sizes, or letters for those that depend on the run.
        parts: together they cover the tensor; with replication several devices hold one.
    """

    title: str
    note: str
    shape: tuple[int | str, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Box:
    """A filled rectangle; units are pixels, from the top left."""

    x: float
    y: float
    width: float
    height: float
    fill: str


@dataclass(frozen=True, kw_only=True)
class Label:
    """A line of text that starts at `x`, or is centred on it; `y` is its baseline."""

    x: float
    y: float
    text: str
    bold: bool = False
    centred: bool = False


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What both writers write."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    labels: tuple[Label, ...]


def planned(placement: Placement, mesh: MeshShape, *, title: str) -> Panel:
    """The panel of a placement; axes may stand in any order and on any dim."""
    axes = ", ".join(axis or "-" for axis in placement.axes)
    sizes = ", ".join(str(size) for size in placement.shape)
    return Panel(
        title=title,
        note=f"[{sizes}] over [{axes}]",
        shape=placement.shape,
        parts=parts(placement.axes, mesh),
    )


def parts(axes: Axes, mesh: MeshShape) -> tuple[Part, ...]:
    """The parts that a mesh cuts a tensor into, in the order of the dims."""
    holders: dict[tuple[Span, ...], list[int]] = {}
    for device in range(mesh.devices):
        place = mesh.coordinates(device)
        spans = tuple(
            _WHOLE
            if axis is None
            else (
                Fraction(place[axis], mesh.size(axis)),
                Fraction(place[axis] + 1, mesh.size(axis)),
            )
            for axis in axes
        )
        holders.setdefault(spans, []).append(device)
    return tuple(
        Part(devices=tuple(devices), spans=spans) for spans, devices in sorted(holders.items())
    )


def draw(title: str, mesh: MeshShape, panels: Sequence[Panel]) -> Drawing:
    """Lay the mesh and the panels out, left to right and then down."""
    boxes: list[Box] = []
    labels = [Label(x=_GAP, y=_GAP + 4, text=title, bold=True)]
    x, y, deepest, widest = _GAP, 2 * _GAP, 0.0, 0.0
    for panel in [_mesh_panel(mesh), *panels]:
        width, height = _panel_size(panel)
        if x > _GAP and x + width > _PAGE:
            x, y, deepest = _GAP, y + deepest + _GAP, 0.0
        panel_boxes, panel_labels = _draw_panel(panel, mesh, x, y)
        boxes += panel_boxes
        labels += panel_labels
        widest, deepest = max(widest, x + width), max(deepest, height)
        x += width + 2 * _GAP
    return Drawing(
        width=widest + _GAP, height=y + deepest + _GAP, boxes=tuple(boxes), labels=tuple(labels)
    )


def svg(drawing: Drawing) -> str:
    """The drawing as an SVG document."""

    def elements() -> Iterator[str]:
        for box in drawing.boxes:
            place = (
                f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
            )
            yield f'<rect {place} fill="{box.fill}" stroke="#444" stroke-width="0.6"/>'
        for label in drawing.labels:
            style = (' font-weight="bold"' if label.bold else "") + (
                ' text-anchor="middle"' if label.centred else ""
            )
            yield f'<text x="{label.x:.1f}" y="{label.y:.1f}"{style}>{escape(label.text)}</text>'

    size = f'width="{drawing.width:.0f}" height="{drawing.height:.0f}" viewBox="0 0 {drawing.width:.1f} {drawing.height:.1f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="DejaVu Sans Mono, monospace" font-size="9">'
    return "\n".join(
        [head, '<rect width="100%" height="100%" fill="white"/>', *elements(), "</svg>", ""]
    )


def check_target(path: Path) -> None:
    """Raise `UsageError` where `write` could not write: before anything else is done."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(
            lines(f"--plot {path} is neither .svg nor .png", "expected one of the two")
        )
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise UsageError(
            lines(
                "--plot of a .png needs matplotlib",
                "run: pip install 'parallama[bench]', or give an .svg",
            )
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            lines(f"--plot {path} cannot be written", "expected a file in a folder that exists")
        )


def write(drawing: Drawing, path: Path) -> None:
    """Write the drawing as SVG or PNG, by the file's ending.

    Raises:
        UsageError: another ending, matplotlib isn't installed, or the path cannot be written.
    """
    check_target(path)
    content = svg(drawing).encode() if path.suffix == ".svg" else _png(drawing)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(
            lines(
                f"--plot {path} cannot be written: {error.strerror}",
                "expected a file in a folder that exists",
            )
        ) from None


def _png(drawing: Drawing) -> bytes:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    picture = io.BytesIO()
    # The user's matplotlibrc must not change the picture, and a `$` in a name is no formula.
    with matplotlib.style.context(
        ["default", {"text.parse_math": False, "font.family": "monospace"}], after_reset=True
    ):
        figure: Any = Figure(figsize=(drawing.width / 100, drawing.height / 100))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, drawing.width)
        axes.set_ylim(drawing.height, 0)
        axes.set_axis_off()
        for box in drawing.boxes:
            axes.add_patch(
                Rectangle(
                    (box.x, box.y),
                    box.width,
                    box.height,
                    facecolor=box.fill,
                    edgecolor="#444444",
                    linewidth=0.5,
                )
            )
        for label in drawing.labels:
            weight, side = "bold" if label.bold else "normal", "center" if label.centred else "left"
            axes.text(
                label.x,
                label.y,
                label.text,
                fontsize=9 * 0.72,
                fontweight=weight,
                horizontalalignment=side,
            )
        # 200 dots an inch: two for each of our pixels.
        figure.savefig(picture, format="png", dpi=200)
    return picture.getvalue()


def devices_text(devices: Sequence[int]) -> str:
    """`3`, `0-3`, `0,4`, or `0,4..28` for steps of one width: short enough for a cell."""
    if len(devices) == 1:
        return str(devices[0])
    step = devices[1] - devices[0]
    even = all(after - before == step for before, after in pairwise(devices))
    if even and step == 1:
        return f"{devices[0]}-{devices[-1]}"
    if even and len(devices) > 3:
        return f"{devices[0]},{devices[1]}..{devices[-1]}"
    shown = ",".join(str(device) for device in devices[:6])
    return shown if len(devices) <= 6 else f"{shown}... ({len(devices)})"


def _mesh_panel(mesh: MeshShape) -> Panel:
    return Panel(
        title=f"mesh {mesh}",
        note="data down, model across",
        shape=(mesh.data, mesh.model),
        parts=parts((DATA, MODEL), mesh),
    )


def _drawn_dims(panel: Panel) -> tuple[int | None, int | None]:
    """Which dims go down and across: those that are split, then the first others."""
    rank = len(panel.shape)
    split = [dim for dim in range(rank) if any(part.spans[dim] != _WHOLE for part in panel.parts)]
    assert len(split) <= 2, "a mesh has two axes"
    chosen = sorted([*split, *(dim for dim in range(rank) if dim not in split)][:2])
    return (chosen[0] if chosen else None, chosen[1] if len(chosen) > 1 else None)


def _body_size(panel: Panel) -> tuple[float, float]:
    """Width and height of the tensor itself: every part has room for its text."""
    down, across = _drawn_dims(panel)

    def pieces(dim: int | None) -> int:
        return 1 if dim is None else len({part.spans[dim] for part in panel.parts})

    text = max(len(devices_text(part.devices)) for part in panel.parts) * _LETTER + 8
    narrowest = _NARROW if across is None else _WIDE
    return max(narrowest, pieces(across) * text), max(_HIGH, pieces(down) * _CELL)


def _panel_size(panel: Panel) -> tuple[float, float]:
    width, height = _body_size(panel)
    words = max(len(panel.title), len(panel.note)) * _LETTER
    return max(width, words), height + 2 * _LINE + 6


def _draw_panel(panel: Panel, mesh: MeshShape, x: float, y: float) -> tuple[list[Box], list[Label]]:
    width, height = _body_size(panel)
    down, across = _drawn_dims(panel)
    labels = [
        Label(x=x, y=y + _LINE, text=panel.title, bold=True),
        Label(x=x, y=y + 2 * _LINE, text=panel.note),
    ]
    top = y + 2 * _LINE + 6
    boxes = []
    for part in panel.parts:
        upper, lower = part.spans[down] if down is not None else _WHOLE
        left, right = part.spans[across] if across is not None else _WHOLE
        box = Box(
            x=x + float(left) * width,
            y=top + float(upper) * height,
            width=float(right - left) * width,
            height=float(lower - upper) * height,
            fill=colour(part.devices, mesh),
        )
        boxes.append(box)
        labels.append(
            Label(
                x=box.x + box.width / 2,
                y=box.y + box.height / 2 + 3,
                text=devices_text(part.devices),
                centred=True,
            )
        )
    return boxes, labels


def colour(devices: Sequence[int], mesh: MeshShape) -> str:
    """The hue tells the place along "model", the lightness that along "data"; what is shared along an axis takes no part of that axis's."""
    places = [mesh.coordinates(device) for device in devices]
    columns, rows = {place[MODEL] for place in places}, {place[DATA] for place in places}
    alone_model, alone_data = len(columns) == 1 and mesh.model > 1, len(rows) == 1 and mesh.data > 1
    light = 0.86 - 0.24 * (min(rows) / max(1, mesh.data - 1)) if alone_data else 0.78
    hue, strength = (min(columns) / mesh.model, 0.65) if alone_model else (0.0, 0.0)
    return "#" + "".join(
        f"{math.floor(255 * channel + 0.5):02x}"
        for channel in colorsys.hls_to_rgb(hue, light, strength)
    )
