"""A benchmark's report as a picture, drawn by matplotlib."""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from ..errors import RunError, UsageError, lines
from .report_text import OURS, bars, case, clean, machine, number, peers
from .rows import Report, Row, What

# Okabe and Ito's palette, which colour-blind people can tell apart. It is without its faint yellow,
# and grey is for its black, on which no error bar shows.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_HATCHES = ("", "///", "...", "xxx")
# The user's matplotlibrc must not change the picture, and a `$` in a name is no formula.
_STYLE: list[Any] = ["default", {"text.parse_math": False, "font.size": 9.0}]
_GROUP_WIDTH = 0.86  # of a group of bars; groups are 1 apart
_WRITABLE = "expected a file in a folder that exists"

Look = tuple[str, str]
"""Colour and hatch."""


def check_target(path: Path) -> None:
    """Raise `UsageError` where `plot` could not write: before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise _no_matplotlib()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(lines(f"--plot {path} cannot be written", _WRITABLE))


def plot(report: Report, path: Path) -> None:
    """Write grouped bars as a PNG: a panel for prefill, one for decode; min and max as error bars.

    Raises:
        UsageError: matplotlib isn't installed, or the path cannot be written.
        RunError: nothing was measured.
    """
    panels: dict[str, list[Row]] = {what: [] for what in get_args(What)}
    for row in report.rows:
        if row.tokens_per_s:
            panels[row.what].append(row)
    panels = {what: rows for what, rows in panels.items() if rows}
    if not panels:
        raise RunError(
            lines(
                "--plot: no case was measured, so there is nothing to plot",
                "see the report's notes for why",
            )
        )
    groups = max(len(rows) for rows in panels.values())
    places = 1 + max(len(row.peers) for rows in panels.values() for row in rows)
    inches = min(40.0, max(8.0, 1.0 + 0.45 * (places + 1) * groups))

    def draw(figure: Any) -> None:
        each = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (what, rows) in zip(each, panels.items(), strict=True):
            _draw_bars(axes, rows, places, _looks(report))
            _draw_frame(axes, what, rows)
        _draw_legend(figure)

    title = [
        f"{clean(report.model)}, {report.dtype}: tokens/s, median, min to max",
        machine(report),
    ]
    write(path, picture(draw, (inches, 1.6 + 3.2 * len(panels)), title))


def write(path: Path, contents: bytes) -> None:
    """Write the file of `--plot`.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.write_bytes(contents)
    except OSError as error:
        raise UsageError(
            lines(f"--plot {path} cannot be written: {error.strerror}", _WRITABLE)
        ) from error


def picture(
    draw: Callable[[Any], None], inches: tuple[float, float], title: Sequence[str]
) -> bytes:
    """The contents of a PNG file.

    Args:
        draw: draws into a figure of matplotlib's.
        inches: width and height.
        title: lines above it.

    Raises:
        UsageError: matplotlib isn't installed.
    """
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise _no_matplotlib() from None
    contents = io.BytesIO()
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure: Any = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        # Not matplotlib's own wrapping: that reads formulas after all.
        wrapped = [textwrap.fill(line, int(12 * inches[0])) for line in title]
        figure.suptitle("\n".join(wrapped), fontsize=10)
        figure.savefig(contents, format="png", dpi=150)
    return contents.getvalue()


def _looks(report: Report) -> dict[str, Look]:
    """Colour and hatch of each engine: hatches tell those apart that share a colour."""
    looks = {}
    for index, name in enumerate((OURS, *peers(report))):
        lap, colour = divmod(index, len(COLOURS))
        looks[name] = (COLOURS[colour], _HATCHES[lap % len(_HATCHES)])
    return looks


def _draw_bars(axes: Any, rows: Sequence[Row], places: int, looks: Mapping[str, Look]) -> None:
    """A group for each row with a place for each bar; where there is no bar its place says so."""
    width = _GROUP_WIDTH / places
    above = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 7}
    for index, row in enumerate(rows):
        for place, bar in enumerate(bars(row)):
            x = index + (place - len(row.peers) / 2) * width
            if bar.speed is None:
                axes.annotate("n/a", (x, 0), (0, 2), color="0.35", **above)
                continue
            colour, hatch = looks[bar.name]
            look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
            middle, low, high = bar.speed.median, bar.speed.min, bar.speed.max
            span = [[middle - low], [high - middle]]
            axes.bar(x, middle, width, label=bar.label, **look)
            axes.errorbar(x, middle, span, elinewidth=1, capsize=2, ecolor="0.2")
            axes.annotate(number(middle), (x, high), (0, 3), **above)


def _draw_frame(axes: Any, what: str, rows: Sequence[Row]) -> None:
    highest = max(bar.speed.max for row in rows for bar in bars(row) if bar.speed)
    axes.set_xticks(range(len(rows)), [case(row, "\n") for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, highest * 1.12)
    axes.set_ylabel("tokens/s")
    axes.set_title(what, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _draw_legend(figure: Any) -> None:
    """One for all panels."""
    patches = {
        label: patch
        for axes in figure.axes
        for patch, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(patches.values()),
        list(patches),
        loc="outside lower center",
        ncols=min(len(patches), 4),
        frameon=False,
    )


def _no_matplotlib() -> UsageError:
    return UsageError(lines("--plot needs matplotlib", "run: pip install 'parallama[bench]'"))
