"""A benchmark's report for people: in the terminal, as a README's table, as a picture."""

from __future__ import annotations

import importlib.util
import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from ..errors import RunError, UsageError, lines
from .profile import KINDS
from .rows import PeerResult, Profile, Report, Row, Speed, Start, What

if TYPE_CHECKING:
    from rich.console import Console

_OURS = "parallama"
_NONE = "-"
_KEYS = 4  # what, mesh, batch, prompt: the columns that say which case a line is
_LEGEND = (
    "tokens/s: median (min-max), all rows of a batch together. Peers: our median over theirs, and their tokens/s; (2p): in two processes. "
    "MBU: bytes that a decode step must read, over the measured bandwidth. MFU: FLOPs of a prefill's products, over the measured GEMM."
)
# Okabe and Ito's palette, which colour-blind people can tell apart; a grey for its black, on which no error bar shows; without its faint yellow.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_HATCHES = ("", "///", "...", "xxx")

_Notes = dict[str, int]  # footnote -> its number


def render(report: Report, console: Console) -> None:
    """Print the report for a terminal of any width from 80 columns; it needs no colour."""
    notes: _Notes = {}
    head = Table.grid(padding=(0, 2))
    for name, value in _header(report):
        head.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    console.print(head)
    if report.starts:
        _print_title(console, "Start: from a new process to the first token")
        _print_table(
            console, _START_HEADS, [_start_cells(start) for start in report.starts], keys=1
        )
    if report.rows:
        _print_title(console, "Speed")
        _print_table(
            console,
            _row_heads(report),
            [_row_cells(row, _peers(report), notes) for row in report.rows],
            keys=_KEYS,
        )
        console.print()
        for note, number in notes.items():
            console.print(Text(f"[{number}] {note}", overflow="fold"))
        console.print(Text(_LEGEND))
    profiles = [cells for row in report.rows for cells in _profile_cells(row)]
    if profiles:
        _print_title(
            console,
            "Where the time goes: core-milliseconds of a prefill or a step, sampled after the above",
        )
        _print_table(console, _PROFILE_HEADS, profiles, keys=_KEYS + 1)
    for what in get_args(What):
        _print_bars(
            console,
            what,
            [row for row in report.rows if row.what == what and row.tokens_per_s],
            notes,
        )


def markdown(report: Report) -> str:
    """The table of speeds as GitHub markdown, its footnotes below, then where the figures come from."""
    notes: _Notes = {}
    heads = _row_heads(report)
    rows = [
        [head.replace("\n", " ") for head in heads],
        *(_row_cells(row, _peers(report), notes) for row in report.rows),
    ]
    table = [
        "| " + " | ".join(_escaped(cell).replace("\n", "<br>") for cell in row) + " |"
        for row in rows
    ]
    table.insert(
        1, "|" + "|".join("---" if index < 2 else "---:" for index in range(len(heads))) + "|"
    )
    below = [f"[{number}] {_escaped(note)}" for note, number in notes.items()]
    origin = [f"{name}: {_escaped(value)}" for name, value in _header(report)]
    return "\n\n".join(["\n".join(table), *below, _escaped(_LEGEND), "<br>\n".join(origin)]) + "\n"


def check_plot(path: Path) -> None:
    """Raise `UsageError` where `plot` could not write: before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(lines("--plot needs matplotlib", "run: pip install 'parallama[bench]'"))
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            lines(f"--plot {path} cannot be written", "expected a file in a folder that exists")
        )


def plot(report: Report, path: Path) -> None:
    """Write grouped bars as a PNG: a panel for prefill and one for decode, min and max as error bars.

    Raises:
        UsageError: matplotlib isn't installed, or the path cannot be written.
        RunError: nothing was measured.
    """
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            lines("--plot needs matplotlib", "run: pip install 'parallama[bench]'")
        ) from None
    measured = [row for row in report.rows if row.tokens_per_s]
    panels = [
        (what, rows)
        for what in get_args(What)
        if (rows := [row for row in measured if row.what == what])
    ]
    if not panels:
        raise RunError(
            lines(
                "--plot: no case was measured, so there is nothing to plot",
                "see the report's notes for why",
            )
        )
    bars = 1 + max(len(row.peers) for row in measured)
    inches = min(40.0, max(8.0, 1.0 + 0.45 * (bars + 1) * max(len(rows) for _, rows in panels)))
    names = enumerate((_OURS, *_peers(report)))
    styles = {
        name: (_COLOURS[index % len(_COLOURS)], _HATCHES[index // len(_COLOURS) % len(_HATCHES)])
        for index, name in names
    }
    picture = io.BytesIO()
    # The user's matplotlibrc must not change the picture, and a `$` in a name is no formula.
    with matplotlib.style.context(
        ["default", {"text.parse_math": False, "font.size": 9.0}], after_reset=True
    ):
        figure: Any = Figure(figsize=(inches, 1.6 + 3.2 * len(panels)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (what, rows) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
        ):
            _draw_panel(axes, what, rows, bars, styles)
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
        # Not matplotlib's own wrapping: that reads formulas after all.
        title = (
            f"{_clean(report.model)}, {report.dtype}: tokens/s, median, min to max",
            _machine(report),
        )
        figure.suptitle(
            "\n".join(textwrap.fill(line, int(12 * inches)) for line in title), fontsize=10
        )
        figure.savefig(picture, format="png", dpi=150)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise UsageError(
            lines(
                f"--plot {path} cannot be written: {error.strerror}",
                "expected a file in a folder that exists",
            )
        ) from error


def _draw_panel(
    axes: Any, what: str, rows: Sequence[Row], bars: int, styles: dict[str, tuple[str, str]]
) -> None:
    """One group for each row, in it one place for each bar; a bar that there isn't says so in its place."""
    width = 0.86 / bars
    above = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 7}
    for index, row in enumerate(rows):
        for place, bar in enumerate(_bars(row)):
            x = index + (place - len(row.peers) / 2) * width
            if bar.speed is None:
                axes.annotate("n/a", (x, 0), (0, 2), color="0.35", **above)
                continue
            colour, hatch = styles[bar.name]
            middle, low, high = bar.speed.median, bar.speed.min, bar.speed.max
            axes.bar(
                x,
                middle,
                width,
                label=bar.label,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.5,
            )
            axes.errorbar(
                x, middle, [[middle - low], [high - middle]], elinewidth=1, capsize=2, ecolor="0.2"
            )
            axes.annotate(_number(middle), (x, high), (0, 3), **above)
    axes.set_xticks(range(len(rows)), [_case(row, "\n") for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, max(bar.speed.max for row in rows for bar in _bars(row) if bar.speed) * 1.12)
    axes.set_ylabel("tokens/s")
    axes.set_title(what, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _print_title(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _print_table(
    console: Console, heads: Sequence[str], body: Sequence[Sequence[str]], keys: int
) -> None:
    """One table, or if that is too wide several, each behind the key columns."""
    columns = list(zip(heads, *body, strict=True))
    widths = [
        2 + max(cell_len(line) for cell in column for line in cell.split("\n"))
        for column in columns
    ]
    height = max(head.count("\n") for head in heads)
    pages: list[list[int]] = [[]]
    for index in range(keys, len(heads)):
        if (
            pages[-1]
            and sum(widths[:keys]) + sum(widths[other] for other in [*pages[-1], index])
            > console.width
        ):
            pages.append([])
        pages[-1].append(index)
    for number, page in enumerate(pages):
        if number:
            console.print()
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for index in (shown := [*range(keys), *page]):
            head = "\n" * (height - heads[index].count("\n")) + heads[index]
            table.add_column(
                Text(head), justify="left" if index < min(keys, 2) else "right", overflow="fold"
            )
        for row in body:
            table.add_row(*(Text(row[index]) for index in shown))
        console.print(table)


def _print_bars(console: Console, what: str, rows: Sequence[Row], notes: _Notes) -> None:
    """A group of bars for each row, all of them to the same scale; ours solid, the peers' shaded."""
    bars = [bar for row in rows for bar in _bars(row)]
    medians = [bar.speed.median for bar in bars if bar.speed]
    if not medians:
        return
    _print_title(console, f"{what}, tokens/s (median), all bars to one scale")
    labels = min(max(cell_len(bar.label) for bar in bars), console.width // 3)
    room = console.width - labels - max(len(_number(median)) for median in medians) - len("    ")
    solid, shaded = "#=" if console.options.ascii_only else "█▒"
    for row in rows:
        console.print(Text(_case(row)))
        for place, bar in enumerate(_bars(row)):
            ours = place == 0
            if bar.speed is None:
                text = f"n/a {_mark(notes, bar.missing)}"
            else:
                text = f"{(solid if ours else shaded) * round(room * bar.speed.median / max(medians))} {_number(bar.speed.median)}"
            console.print(
                Text(f"  {set_cell_size(bar.label, labels)} {text}", style="bold" if ours else "")
            )


class _Bar(NamedTuple):
    """What was measured of ours or of a peer, or why it wasn't."""

    name: str
    label: str
    speed: Speed | None
    missing: str = ""


def _bars(row: Row) -> list[_Bar]:
    ours = _Bar(_OURS, _OURS, row.tokens_per_s)
    return [
        ours,
        *(
            _Bar(_clean(peer.peer), ", ".join(_named(peer)), peer.tokens_per_s, _failure(peer))
            for peer in row.peers
        ),
    ]


def _named(result: PeerResult) -> list[str]:
    return [
        _clean(result.peer),
        *([f"{result.processes} processes"] if result.processes > 1 else []),
    ]


def _failure(result: PeerResult) -> str:
    return f"{', '.join(_named(result))}: {_clean(result.error or '') or 'no reason given'}"


def _peers(report: Report) -> list[str]:
    """Every peer of any row, in the order in which they come."""
    return list(dict.fromkeys(_clean(result.peer) for row in report.rows for result in row.peers))


def _header(report: Report) -> list[tuple[str, str]]:
    return [
        (
            "model",
            f"{_clean(report.model)}, {report.dtype}, {report.backend} backend, {report.threads} threads",
        ),
        ("machine", _machine(report)),
        (
            "versions",
            _clean(", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ),
        ("run", _clean(f"{report.date}: {report.command}")),
    ]


def _machine(report: Report) -> str:
    machine = report.machine
    limits = f"reads {machine.bandwidth_bytes_per_s / 1e9:.1f} GB/s, GEMM {machine.gemm_flops_per_s / 1e9:.1f} GFLOP/s"
    return f"{_clean(machine.cpu)}, {report.threads} threads: {limits}"


_TIMES = ("import", "load", "trace", "compile", "first\ntoken", "cold\nTTFT", "warm\nTTFT")
_START_HEADS = ("mesh", *(f"{time}\ns" for time in _TIMES), "bytes per\ndevice", "peak\nRSS")


def _start_cells(start: Start) -> list[str]:
    seconds = (
        start.import_s,
        start.load_s,
        start.trace_s,
        start.compile_s,
        start.first_token_s,
        start.cold_ttft_s,
        start.warm_ttft_s,
    )
    low, high = (
        _bytes(min(start.param_bytes_per_device, default=0)),
        _bytes(max(start.param_bytes_per_device, default=0)),
    )
    each = low if low == high else f"{low}\nto {high}"
    devices = f"{len(start.param_bytes_per_device)} x {each}"
    return [
        _clean(start.mesh),
        *(f"{value:.2f}" for value in seconds),
        devices,
        _bytes(start.peak_rss_bytes),
    ]


def _row_heads(report: Report) -> list[str]:
    ours = [
        "what",
        "mesh",
        "batch",
        "prompt",
        "tokens/s\n(min-max)",
        "MBU or\nMFU",
        "host\nms/step",
    ]
    return [*ours, *(peer.replace(" ", "\n") for peer in _peers(report))]


def _row_cells(row: Row, peers: Sequence[str], notes: _Notes) -> list[str]:
    if row.tokens_per_s is None:
        reason = _clean(row.skipped or "") or "no reason given"
        speed = "skipped " + _mark(notes, f"{row.what} {_case(row)}: {reason}")
    else:
        speed = f"{_number(row.tokens_per_s.median)} ({_number(row.tokens_per_s.min)}-{_number(row.tokens_per_s.max)})"
    shares = [
        f"{name} {share:.1%}"
        for name, share in (("MBU", row.mbu), ("MFU", row.mfu))
        if share is not None
    ]
    host = _NONE if row.host_ms_per_step is None else f"{row.host_ms_per_step:.2f}"
    case = [row.what, _clean(row.mesh), str(row.batch), str(row.prompt)]
    return [
        *case,
        speed,
        "\n".join(shares) or _NONE,
        host,
        *(_peer_cell(row, peer, notes) for peer in peers),
    ]


def _peer_cell(row: Row, peer: str, notes: _Notes) -> str:
    """All that a peer did with a row: more than one result if it ran with several numbers of processes."""
    found: list[str] = []
    for result in (result for result in row.peers if _clean(result.peer) == peer):
        if result.tokens_per_s is None:
            found.append(f"n/a {_mark(notes, _failure(result))}")
            continue
        ratio = _NONE if result.ratio is None else f"{result.ratio:.2f}x"
        processes = f" ({result.processes}p)" if result.processes > 1 else ""
        uncompared = (
            f" {_mark(notes, 'its tokens were not compared with ours')}"
            if result.same_tokens is None
            else ""
        )
        found.append(f"{ratio} {_number(result.tokens_per_s.median)}{processes}{uncompared}")
        if result.same_tokens is False:
            found.append("tokens differ")
        if result.error is not None:
            found.append(_mark(notes, _failure(result)))
    itself = peer == f"{_OURS} {row.mesh}"
    return "\n".join(found) or (_NONE if row.tokens_per_s is None or itself else "not run")


_PROFILE_HEADS = ("what", "mesh", "batch", "prompt", "engine", "ms a\npass", *KINDS, "idle")


def _profile_cells(row: Row) -> list[list[str]]:
    engines: list[tuple[str, Profile | None]] = [
        (_OURS, row.profile),
        *((", ".join(_named(peer)), peer.profile) for peer in row.peers),
    ]
    case = [row.what, _clean(row.mesh), str(row.batch), str(row.prompt)]
    return [
        [
            *case,
            name,
            _number(taken.ms_per_pass),
            *(_number(taken.core_ms_per_pass[kind]) for kind in (*KINDS, "idle")),
        ]
        for name, taken in engines
        if taken is not None
    ]


def _mark(notes: _Notes, note: str) -> str:
    return f"[{notes.setdefault(note, len(notes) + 1)}]"


def _case(row: Row, glue: str = ", ") -> str:
    return glue.join((_clean(row.mesh), f"batch {row.batch}", f"prompt {row.prompt}"))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _clean(text: str) -> str:
    """On one line and without control characters: other programs' messages come with both."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _escaped(text: str) -> str:
    """For markdown; our own `[1]` and underscores within words mean nothing there and stay readable."""
    return re.sub(r"[\\`*<>|~$&]|\[(?!\d+\](?![(\[:]))|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
