"""A table as GitHub markdown. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Heads and rows of cells, which are markdown themselves.

    Args:
        left: so many first columns stand to the left, the others to the right.
    """
    sides = ["---"] * left + ["---:"] * (len(heads) - left)
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "|".join(sides) + "|", *lines[1:]])
