"""Pictures of which device holds what: the mesh, and tensors cut into the devices' parts. Pure.

A `Panel` says which devices hold which part of a tensor; `planned` makes one from a placement, and
one of measured parts can be made by hand. `draw` turns panels into boxes and labels, which
`picture_files` writes.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from ..errors import UsageError, lines
from .mesh_shape import MeshShape
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
        spans: which part it is: one span for each dim.
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
        parts: together they cover the tensor; a replicated part has several devices.
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
    """What is written to a file."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    labels: tuple[Label, ...]


def planned(placement: Placement, mesh: MeshShape, *, title: str) -> Panel:
    """The panel of a placement; axes may be in any order and on any dim."""
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
        at = mesh.coordinates(device)
        spans = tuple(_WHOLE if axis is None else _span(at[axis], mesh[axis]) for axis in axes)
        holders.setdefault(spans, []).append(device)
    return tuple(
        Part(devices=tuple(devices), spans=spans) for spans, devices in sorted(holders.items())
    )


def _span(place: int, places: int) -> Span:
    return Fraction(place, places), Fraction(place + 1, places)


def device_rows(mesh: MeshShape) -> list[list[int]]:
    """The devices as they are drawn: the last axis goes across, the others go down."""
    return mesh.groups(list(mesh)[-1])


def directions(mesh: MeshShape) -> str:
    """Which axes of a drawn mesh go down and across, in words."""
    *outer, inner = mesh
    return f"{' x '.join(outer)} down, {inner} across"


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
    rows = device_rows(mesh)
    found = [
        Part(devices=(device,), spans=(_span(down, len(rows)), _span(across, len(row))))
        for down, row in enumerate(rows)
        for across, device in enumerate(row)
    ]
    return Panel(
        title=f"mesh {mesh}",
        note=directions(mesh),
        shape=(len(rows), len(rows[0])),
        parts=tuple(found),
    )


def _drawn_dims(panel: Panel) -> tuple[int | None, int | None]:
    """Which dims go down and across: those that are split, then the first others."""
    rank = len(panel.shape)
    split = [dim for dim in range(rank) if any(part.spans[dim] != _WHOLE for part in panel.parts)]
    if len(split) > 2:
        raise UsageError(
            lines(
                f"{panel.title} is split along {len(split)} dims: {split}",
                "expected at most 2, which a picture can show",
            )
        )
    whole = [dim for dim in range(rank) if dim not in split]
    chosen: list[int | None] = [*sorted([*split, *whole][:2])]
    down, across = (*chosen, None, None)[:2]
    return down, across


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
        upper, lower = _WHOLE if down is None else part.spans[down]
        left, right = _WHOLE if across is None else part.spans[across]
        box = Box(
            x=x + float(left) * width,
            y=top + float(upper) * height,
            width=float(right - left) * width,
            height=float(lower - upper) * height,
            fill=colour(part.devices, mesh),
        )
        boxes.append(box)
        middle, baseline = box.x + box.width / 2, box.y + box.height / 2 + 3
        text = devices_text(part.devices)
        labels.append(Label(x=middle, y=baseline, text=text, centred=True))
    return boxes, labels


def colour(devices: Sequence[int], mesh: MeshShape) -> str:
    """The colour of what these devices hold, as `#rrggbb`.

    The hue tells the column of `device_rows`, the lightness the row. What several columns share is
    grey; what several rows share has the lightness of none.
    """
    places = _places(mesh)
    rows, columns = {places[each][0] for each in devices}, {places[each][1] for each in devices}
    last_row, last_column = places[mesh.devices - 1]
    light, hue, strength = 0.78, 0.0, 0.0
    if len(rows) == 1 and last_row > 0:
        light = 0.86 - 0.24 * min(rows) / last_row
    if len(columns) == 1 and last_column > 0:
        hue, strength = min(columns) / (last_column + 1), 0.65
    channels = colorsys.hls_to_rgb(hue, light, strength)
    return "#" + "".join(f"{math.floor(255 * channel + 0.5):02x}" for channel in channels)


@lru_cache(maxsize=8)
def _places(mesh: MeshShape) -> Mapping[int, tuple[int, int]]:
    """Row and column of every device."""
    return {
        device: (down, across)
        for down, row in enumerate(device_rows(mesh))
        for across, device in enumerate(row)
    }
