"""A benchmark's report as GitHub markdown. Pure."""

from __future__ import annotations

import re

from .markdown_table import markdown_table
from .report_text import LEGEND, Notes, header, peers, row_cells, row_heads
from .rows import Report


def markdown(report: Report) -> str:
    """The table of speeds, its footnotes below, then where the figures come from."""
    notes = Notes()
    rows = [row_cells(row, peers(report), notes) for row in report.rows]
    heads = [head.replace("\n", " ") for head in row_heads(report)]
    table = markdown_table(_cells(heads), [_cells(row) for row in rows], left=2)
    below = [f"{mark} {_escaped(note)}" for mark, note in notes.items()]
    origin = [f"{name}: {_escaped(value)}" for name, value in header(report)]
    return "\n\n".join([table, *below, _escaped(LEGEND), "<br>\n".join(origin)]) + "\n"


def _cells(texts: list[str]) -> list[str]:
    return [_escaped(text).replace("\n", "<br>") for text in texts]


def _escaped(text: str) -> str:
    """Our own `[1]` and underscores within words mean nothing in markdown and stay readable."""
    return re.sub(r"[\\`*<>|~$&]|\[(?!\d+\](?![(\[:]))|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
