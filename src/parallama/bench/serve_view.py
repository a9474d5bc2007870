"""A benchmark of servers for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from .serve_report import ServeReport, cells, header, heads, notes

if TYPE_CHECKING:
    from rich.console import Console


def render(report: ServeReport, console: Console) -> None:
    """Print the report."""
    head = Table.grid(padding=(0, 2))
    for name, value in header(report):
        head.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    console.print(head)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for place, title in enumerate(heads(report)):
        table.add_column(Text(title), justify="right" if place else "left", overflow="fold")
    for row in cells(report):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for note in notes(report):
        console.print(Text(note, overflow="fold"))
