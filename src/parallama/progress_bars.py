"""Progress bars on standard error, for what takes seconds. Pure."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_IN_BYTES = ("loading", "writing", "moving")
"""Progress that counts bytes; other counts pieces."""


class ProgressBars:
    """A bar for each kind of work, gone once it is done. It is a `Progress`."""

    def __init__(self) -> None:
        self._running: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` is done of some work."""
        bar = self._running.get(what)
        if bar is None:
            from tqdm.auto import tqdm

            options: dict[str, Any] = {"unit": "B", "unit_scale": True} if what in _IN_BYTES else {}
            if sys.stderr.isatty():  # it may not know its size: then tqdm would show nothing
                columns, lines = shutil.get_terminal_size()
                options |= {"ncols": columns, "nrows": lines}
            bar = tqdm(desc=what, total=total, leave=False, file=sys.stderr, **options)
            self._running[what] = bar
        bar.total, bar.n = total, done
        bar.refresh()
        if done >= total:
            self._running.pop(what).close()

    def close(self) -> None:
        """Take away what is still shown."""
        while self._running:
            self._running.popitem()[1].close()


def is_watched() -> bool:
    """Whether somebody sees standard error: on a terminal, or in a notebook."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return terminal or "ipykernel" in sys.modules


@contextmanager
def progress_bars(quiet: bool) -> Iterator[ProgressBars | None]:
    """Bars where somebody sees them; None otherwise, and with `quiet`."""
    bars = None if quiet or not is_watched() else ProgressBars()
    try:
        yield bars
    finally:
        if bars is not None:
            bars.close()
