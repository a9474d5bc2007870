"""Which options stand on the command line, and which of them mean nothing there."""

from __future__ import annotations

from collections.abc import Container

import typer

from ..errors import UsageError, lines


def stated(context: typer.Context) -> dict[str, str]:
    """The options that stand on the command line: parameter name to spelling (`--grad-accum`)."""
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name:
            found[parameter.name] = parameter.opts[0]
    return found


def refuse(context: typer.Context, names: Container[str], problem: str, expected: str) -> None:
    """Raise `UsageError` where one of these options stands on the command line.

    Args:
        names: parameters of the command's function.
        problem: what is wrong with the option, behind its spelling.
    """
    for name, spelling in stated(context).items():
        if name in names:
            raise UsageError(lines(f"{spelling} {problem}", expected))
