"""A user's own plan: parameter-name patterns, each with a style or a list of axes. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import text_files
from ..errors import PlanError, cause, lines, shown
from .styles import STYLES, Style, is_axes

Overrides = Mapping[str, Style]
"""Parameter-name pattern to a style or a list of axes."""


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted pattern covers a dotted name; `*` and `?` stay within one part."""
    patterns, parts = pattern.split("."), name.split(".")
    return len(patterns) == len(parts) and all(map(fnmatch.fnmatchcase, parts, patterns))


def read_overrides(path: str | Path) -> dict[str, str | list[str | None]]:
    """Read a user's plan from YAML or JSON: pattern to a style, or to a list of axes per dim.

    Raises:
        PlanError: the file can't be read or isn't such a mapping.
    """
    document, keys = _load(path)
    if not isinstance(document, dict) or not document:
        raise PlanError(
            lines(
                f"plan file {str(path)!r} holds no mapping",
                "expected 'pattern: style' or 'pattern: [axis, ...]' lines",
            )
        )
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise PlanError(
            lines(f"plan file {str(path)!r} has the pattern {twice!r} twice", "expected each once")
        )
    for pattern, style in document.items():
        known = isinstance(style, str) or (isinstance(style, list) and is_axes(style))
        if not isinstance(pattern, str) or not known:
            raise PlanError(
                lines(
                    f"plan file {str(path)!r}: {shown(pattern)} maps to {shown(style)}",
                    f"expected one of {', '.join(STYLES)}, "
                    "or a list of axis names and nulls, one per dim",
                )
            )
    return document


def _load(path: str | Path) -> tuple[Any, list[Any]]:
    """A YAML file's document, and all keys of its mapping: loading keeps the last of equal ones."""
    import yaml

    try:
        text = text_files.read(Path(path))
        document = yaml.safe_load(text)
        nodes = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PlanError(
            lines(
                f"plan file {str(path)!r} cannot be read: {cause(error, 120)}",
                "expected YAML or JSON",
            )
        ) from None
    pairs = nodes.value if isinstance(nodes, yaml.MappingNode) else []
    return document, [key.value for key, _ in pairs]
