"""Pictures as files: SVG by hand, PNG by matplotlib. Pure."""

from __future__ import annotations

import io
from collections.abc import Iterator
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError, lines
from .picture import Drawing

_EXPECTED = "expected a file in a folder that exists"


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
        raise UsageError(lines(f"--plot {path} cannot be written", _EXPECTED))


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
            lines(f"--plot {path} cannot be written: {error.strerror}", _EXPECTED)
        ) from None


def svg(drawing: Drawing) -> str:
    """The drawing as an SVG document."""
    width, height = drawing.width, drawing.height
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.1f} {height:.1f}" '
        'font-family="DejaVu Sans Mono, monospace" font-size="9">'
    )
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, paper, *_elements(drawing), "</svg>", ""])


def _elements(drawing: Drawing) -> Iterator[str]:
    for box in drawing.boxes:
        place = f'x="{box.x:.1f}" y="{box.y:.1f}"'
        size = f'width="{box.width:.1f}" height="{box.height:.1f}"'
        yield f'<rect {place} {size} fill="{box.fill}" stroke="#444" stroke-width="0.6"/>'
    for label in drawing.labels:
        bold = ' font-weight="bold"' if label.bold else ""
        centred = ' text-anchor="middle"' if label.centred else ""
        place = f'x="{label.x:.1f}" y="{label.y:.1f}"'
        yield f"<text {place}{bold}{centred}>{escape(label.text)}</text>"


def _png(drawing: Drawing) -> bytes:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    picture = io.BytesIO()
    # The user's matplotlibrc must not change the picture, and a `$` in a name is no formula.
    style: dict[str, Any] = {"text.parse_math": False, "font.family": "monospace"}
    with matplotlib.style.context(["default", style], after_reset=True):
        figure: Any = Figure(figsize=(drawing.width / 100, drawing.height / 100))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, drawing.width)
        axes.set_ylim(drawing.height, 0)
        axes.set_axis_off()
        for box in drawing.boxes:
            patch = Rectangle(
                (box.x, box.y),
                box.width,
                box.height,
                facecolor=box.fill,
                edgecolor="#444444",
                linewidth=0.5,
            )
            axes.add_patch(patch)
        for label in drawing.labels:
            axes.text(
                label.x,
                label.y,
                label.text,
                fontsize=9 * 0.72,
                fontweight="bold" if label.bold else "normal",
                horizontalalignment="center" if label.centred else "left",
            )
        figure.savefig(picture, format="png", dpi=200)  # two dots for each of our pixels
    return picture.getvalue()
