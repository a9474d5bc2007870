"""A benchmark's report for the terminal: tables, then bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from .report_text import (
    CASE_COLUMNS,
    LEGEND,
    PROFILE_HEADS,
    START_HEADS,
    Notes,
    bars,
    case,
    header,
    number,
    peers,
    profile_cells,
    row_cells,
    row_heads,
    start_cells,
)
from .rows import Report, Row, What

if TYPE_CHECKING:
    from rich.console import Console

_LEFT = 2  # columns of names, which stand to the left; numbers stand to the right
_PADDING = 2  # of a column
_PROFILES = "Where the time goes: core-milliseconds of a prefill or a step, sampled after the above"


def render(report: Report, console: Console) -> None:
    """Print the report for a terminal of any width from 80 columns; it needs no colour."""
    notes = Notes()
    head = Table.grid(padding=(0, 2))
    for name, value in header(report):
        head.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    console.print(head)
    if report.starts:
        _print_title(console, "Start: from a new process to the first token")
        starts = [start_cells(start) for start in report.starts]
        _print_table(console, START_HEADS, starts, keys=1)
    if report.rows:
        _print_title(console, "Speed")
        rows = [row_cells(row, peers(report), notes) for row in report.rows]
        _print_table(console, row_heads(report), rows, keys=CASE_COLUMNS)
        console.print()
        for mark, note in notes.items():
            console.print(Text(f"{mark} {note}", overflow="fold"))
        console.print(Text(LEGEND))
    profiles = [cells for row in report.rows for cells in profile_cells(row)]
    if profiles:
        _print_title(console, _PROFILES)
        _print_table(console, PROFILE_HEADS, profiles, keys=CASE_COLUMNS + 1)
    for what in get_args(What):
        measured = [row for row in report.rows if row.what == what and row.tokens_per_s]
        _print_bars(console, what, measured, notes)


def _print_title(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))


def _print_table(
    console: Console, heads: Sequence[str], body: Sequence[Sequence[str]], keys: int
) -> None:
    """One table, or if that is too wide several, each with the first `keys` columns."""
    for page, columns in enumerate(_pages(heads, body, keys, console.width)):
        if page:
            console.print()
        _print_columns(console, heads, body, [*range(keys), *columns], min(keys, _LEFT))


def _pages(
    heads: Sequence[str], body: Sequence[Sequence[str]], keys: int, width: int
) -> list[list[int]]:
    """Which columns behind the first `keys` fit beside them, table by table."""
    widths = [
        _PADDING + max(cell_len(line) for cell in column for line in cell.split("\n"))
        for column in zip(heads, *body, strict=True)
    ]
    room = width - sum(widths[:keys])
    pages: list[list[int]] = [[]]
    for index in range(keys, len(heads)):
        if pages[-1] and sum(widths[other] for other in [*pages[-1], index]) > room:
            pages.append([])
        pages[-1].append(index)
    return pages


def _print_columns(
    console: Console,
    heads: Sequence[str],
    body: Sequence[Sequence[str]],
    columns: Sequence[int],
    left: int,
) -> None:
    height = max(head.count("\n") for head in heads)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index in columns:
        head = "\n" * (height - heads[index].count("\n")) + heads[index]
        table.add_column(Text(head), justify="left" if index < left else "right", overflow="fold")
    for row in body:
        table.add_row(*(Text(row[index]) for index in columns))
    console.print(table)


def _print_bars(console: Console, what: str, rows: Sequence[Row], notes: Notes) -> None:
    """Bars for each row, all to the same scale; ours solid, the peers' shaded."""
    every = [bar for row in rows for bar in bars(row)]
    medians = [bar.speed.median for bar in every if bar.speed]
    if not medians:
        return
    _print_title(console, f"{what}, tokens/s (median), all bars to one scale")
    labels = min(max(cell_len(bar.label) for bar in every), console.width // 3)
    numbers = max(len(number(median)) for median in medians)
    longest = console.width - labels - numbers - len("    ")
    solid, shaded = "#=" if console.options.ascii_only else "█▒"
    for row in rows:
        console.print(Text(case(row)))
        for place, bar in enumerate(bars(row)):
            if bar.speed is None:
                text = f"n/a {notes.mark(bar.missing)}"
            else:
                length = round(longest * bar.speed.median / max(medians))
                text = f"{(shaded if place else solid) * length} {number(bar.speed.median)}"
            label = set_cell_size(bar.label, labels)
            console.print(Text(f"  {label} {text}", style="" if place else "bold"))
