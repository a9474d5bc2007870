"""What a run tells while it goes on. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Watch:
    """Who is told of a run; every field may be left out.

    Attributes:
        say: takes a line for people.
        progress: takes what is being done, how much of it is done, and how much there is.
        step: takes the log entry of a step, and how many steps there are.
    """

    say: Callable[[str], None] = field(default=lambda _line: None)
    progress: Callable[[str, int, int], None] | None = None
    step: Callable[[dict[str, Any], int], None] = field(default=lambda _entry, _steps: None)

    def of(self, what: str) -> Callable[[int, int], None] | None:
        """`progress` for one thing."""
        report = self.progress
        return None if report is None else lambda done, total: report(what, done, total)
