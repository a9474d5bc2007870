"""Options that mean nothing where they stand on the command line. Pure."""

from __future__ import annotations

from collections.abc import Container

import typer

from ..errors import UsageError, lines


def refuse(context: typer.Context, names: Container[str], problem: str, expected: str) -> None:
    """Raise `UsageError` where one of these options stands on the command line.

    Args:
        names: parameters of the command's function.
        problem: what is wrong with the option, behind its spelling (`--grad-accum`).
    """
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name in names:
            raise UsageError(lines(f"{parameter.opts[0]} {problem}", expected))
