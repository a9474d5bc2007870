"""Groups of options: a command takes one as a parameter, typer sees an option for each field. Pure.

A group is a frozen dataclass whose fields are typer's annotated options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer

from . import model_command

_MODEL_OPTION = Parameter(
    model_command.OPTION,
    Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None, typer.Option("--model", help="MODEL, where that isn't given as an argument.")
    ],
)


def expanded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command for typer: every parameter that is a group becomes one for each of its fields.

    The options stand where the group stood, in the order of the fields. Only keywords are passed.
    A command with a MODEL takes `--model`, too, which `ModelCommand` reads.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(kind := hints[name]) and isinstance(kind, type):
            groups[name] = kind
            parameters += _parameters(kind)
        else:
            parameters.append(
                parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY)
            )

    if any(parameter.name == "model" for parameter in parameters):
        parameters.append(_MODEL_OPTION)

    @wraps(command)
    def packed(**given: Any) -> Any:
        given.pop(model_command.OPTION, None)
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        return command(**given)

    made: Any = packed
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    # The source breaks lines at its own width; the help's are the terminal's.
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    made.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return packed


def _parameters(group: Any) -> list[Parameter]:
    """A keyword for each field of a group."""
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
