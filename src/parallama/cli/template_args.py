"""`--chat-template-arg key=JSON`: variables for a model's chat template. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import UsageError, lines

TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-template-arg",
        help="key=JSON for the chat template, as enable_thinking=false; several times.",
    ),
]


def template_kwargs(given: Sequence[str] | None) -> dict[str, Any]:
    """The variables by name.

    Raises:
        UsageError: one has no name or no JSON, or is given twice.
    """
    found: dict[str, Any] = {}
    for each in given or []:
        name, _, value = each.partition("=")
        if not name.isidentifier() or name in found:
            problem = "was given twice" if name in found else "has no name"
            raise UsageError(
                lines(f"--chat-template-arg {each} {problem}", "expected key=JSON, each key once")
            )
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError(
                lines(
                    f"--chat-template-arg {each}: {value!r} is no JSON",
                    f"""expected as {name}=false, {name}=3, or '{name}="a text"' in quotes""",
                )
            ) from None
    return found
