"""A command whose MODEL may stand as an argument or behind `--model`, as in other programs."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand

from ..errors import UsageError, lines

OPTION = "model_option"
"""The parameter of `--model`."""


class ModelCommand(TyperCommand):
    """Takes the value of `--model` for the first argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # for completion
            return super().parse_args(ctx, args)
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        model = given.get(OPTION)
        if not isinstance(model, str):
            return super().parse_args(ctx, args)
        arguments = [each.name for each in self.params if isinstance(each, TyperArgument)]
        if all(isinstance(given.get(name), str) for name in arguments):
            raise UsageError(
                lines(
                    f"MODEL is given twice: {given[arguments[0]]!r}, and --model {model!r}",
                    "expected one of the two",
                )
            )
        return super().parse_args(ctx, [model, *args])
