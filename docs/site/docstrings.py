"""For griffe: `a, b: what both are` in a docstring's Args or Attributes is one entry for each."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

SECTIONS = ("Args:", "Attributes:")
ENTRY = re.compile(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*):(.*)")


def one_name_each(docstring: str) -> str:
    """A docstring whose entries have one name each."""
    out: list[str] = []
    within, names, text = False, [""], [""]

    def write() -> None:
        for name in names[:-1]:
            out.extend([f"    {name}:{text[0]}", *text[1:]])

    for line in [*inspect.cleandoc(docstring).splitlines(), "."]:
        entry = ENTRY.fullmatch(line) if within else None
        if entry is not None or (line and not line.startswith("    ")):
            write()
            names, text = [""], [""]
            within = within if entry is not None else line in SECTIONS
        if entry is not None:
            names, text = [*entry[1].split(", "), ""], [entry[2]]
        elif len(names) > 1:
            text.append(line)
        else:
            out.append(line)
    return "\n".join(out[:-1])


class OneNameEach(griffe.Extension):
    """`one_name_each` for every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_options: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = one_name_each(obj.docstring.value)
